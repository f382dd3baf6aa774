"""Ahead of a run: does it fit, how fast can it be, what does it cost (`deepseek-jax plan`, `dsj.plan`).

`request.py` says what is planned, `analysis.py` answers by arithmetic, `compiled.py` asks the real compiler. The room is
called planner/ because a module named plan would hide the function `dsj.plan`.
"""

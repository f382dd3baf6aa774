"""Answers over HTTP and in a terminal.

    from deepseek_jax.serve import bind, create_app, serve
    serve(create_app(engine, tokenizer, template, name="my-model"), bind(port=8000))

`create_app` is an ASGI app that speaks the OpenAI API; `serve` runs it until a signal comes. Both need the extra `serve`;
the conversation in a terminal does not, so they are imported when they are asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek_jax.serve.app import create_app
    from deepseek_jax.serve.server import bind, serve

__all__ = ["bind", "create_app", "serve"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from deepseek_jax.serve.app import create_app
        from deepseek_jax.serve.server import bind, serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise ValueError(f"{error.name} is not installed: pip install 'deepseek-jax[serve]'") from None
    globals().update(bind=bind, create_app=create_app, serve=serve)
    return globals()[name]

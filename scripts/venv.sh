#!/bin/sh
# Make or reuse a virtual environment that holds this package (editable) and some of its extras:
#
#     scripts/venv.sh FOLDER [EXTRA,EXTRA…]
#
# A second call returns at once, unless pyproject.toml has changed since. Uses uv where it is installed, else venv and
# pip. PYTHON names the interpreter; otherwise the first of the usual names that is 3.11 or newer is taken.
set -eu

folder=$1
extras=$(printf '%s' "${2:-}" | sed 's/^,*//; s/,*$//')
cd "$(dirname "$0")/.."

find_python() {
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    return 1
}

create() {
    if ! python=$(find_python); then
        if command -v uv >/dev/null && [ -z "${PYTHON:-}" ]; then
            python=3.12 # uv fetches it
        else
            echo "error: no Python 3.11 or newer with its venv module among: ${PYTHON:-python3 python3.11 … python}" >&2
            echo "Install one (on Debian and Ubuntu the module is the package python3-venv), or name it: make … PYTHON=/path/to/python" >&2
            exit 1
        fi
    fi
    echo "Creating $folder with $python" >&2
    if command -v uv >/dev/null; then
        uv venv --quiet --seed --python "$python" "$folder"
    else
        "$python" -m venv "$folder"
    fi
    pwd >"$folder/.made-for"
}

# An environment does not survive a move of the checkout: its scripts name their interpreter by absolute path.
if [ -f "$folder/.made-for" ] && [ "$(cat "$folder/.made-for")" != "$(pwd)" ]; then
    rm -rf "$folder"
fi
[ -x "$folder/bin/python" ] || create

installed="$folder/.installed-${extras:-base}"
wanted=$(cksum <pyproject.toml)
if [ "$(cat "$installed" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing deepseek_jax${extras:+ with $extras} into $folder (some minutes, once)" >&2
    if command -v uv >/dev/null; then
        uv pip install --quiet --python "$folder/bin/python" --editable ".${extras:+[$extras]}"
    else
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}"
    fi
    echo "$wanted" >"$installed"
fi

"""Money per chip hour, from a dated file that anyone may edit or replace."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Price:
    """Of one chip for one hour."""

    amount: float
    currency: str
    as_of: str
    source: str
    assumed: bool
    """True: nobody looked the price up."""


def price_of(device: str, file: str | Path | None = None) -> Price | None:
    """Price of a chip of `device` (a name of hardware.py) from `file`, by default the package's own prices.json.

    Returns: None where the file has no such device.

    Raises:
        ValueError: no such file, or one that is not as prices.json is; the message names the entry.
    """
    if file is None:
        text, where = (
            resources.files("deepseek_jax.planner").joinpath("prices.json").read_text(encoding="utf-8"),
            "prices.json",
        )
    else:
        where = str(file)
        try:
            text = Path(file).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--prices {where}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise ValueError(f"--prices {where}: is no text: must be JSON like planner/prices.json") from None
    try:
        table = json.loads(text)
        row = table["prices"].get(device)
        if row is None:
            return None
        price = Price(
            amount=float(row["price"]), currency=str(table["currency"]), as_of=str(table["as_of"]),
            source=str(row["source"]), assumed=row["assumed"],
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{where}: {error!r}; a price file has "as_of", "currency" and, in "prices", for each device a "price", '
            f'"assumed" and "source"'
        ) from None
    if not 0 < price.amount < math.inf:
        raise ValueError(f"{where}: prices.{device}.price = {price.amount}: must be a number greater than 0")
    if not isinstance(price.assumed, bool):
        raise ValueError(f"{where}: prices.{device}.assumed = {price.assumed!r}: must be true or false")
    return price

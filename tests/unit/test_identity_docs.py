"""The example of docs/identity.md signs as the exchange checks."""

import hmac
import re
from pathlib import Path
from typing import Any

from api.identity.signatures import canonical

PAGE = (Path(__file__).parents[2] / "docs" / "identity.md").read_text(encoding="utf-8")


def test_the_example_signs_what_is_checked() -> None:
    [example] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)  # our own page
    headers = names["signed"]("ak_x", "secret", "POST", "/api/orders?wait=placed", b"{}")
    text = canonical("POST", "/api/orders?wait=placed", headers["X-Api-Timestamp"], "5000", "", b"{}")
    assert headers["X-Api-Signature"] == hmac.digest(b"secret", text, "sha256").hex()

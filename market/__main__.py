"""``python -m market``: the market data process."""

import uvloop

from logs import set_up_logging
from market.main import main
from settings import get_settings

if __name__ == "__main__":
    settings = get_settings()
    set_up_logging(settings)
    uvloop.run(main(settings))

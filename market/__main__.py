"""``python -m market``: the market data process."""

import logging

import uvloop

from market.main import main
from settings import get_settings

if __name__ == "__main__":
    settings = get_settings()
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    uvloop.run(main(settings))

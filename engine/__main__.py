"""`python -m engine`: match orders until SIGTERM or SIGINT."""

import logging

import uvloop

from engine.main import serve
from settings import get_settings

settings = get_settings()
logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
uvloop.run(serve(settings))

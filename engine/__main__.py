"""`python -m engine`: match orders until SIGTERM or SIGINT."""

import uvloop

from engine.main import serve
from logs import set_up_logging
from settings import get_settings

settings = get_settings()
set_up_logging(settings)
uvloop.run(serve(settings))

# One image for all of the exchange's own processes; docker-compose.yml says which one a container runs.
FROM python:3.11-slim

WORKDIR /app
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The lock file is that of `make`: it brings the test tools and the embedded servers along.
COPY requirements.lock .
RUN pip install --require-hashes --requirement requirements.lock
COPY alembic.ini settings.py clients.py worker.py ./
COPY domain domain
COPY storage storage
COPY activities activities
COPY workflows workflows
COPY engine engine
COPY market market
COPY monitors monitors
COPY reporting reporting
COPY api api
RUN python -m compileall -q .
USER 10001
CMD ["python", "-m", "api"]

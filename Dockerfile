# One image for all of the exchange's own processes; docker-compose.yml says which one a container runs.
FROM python:3.11-slim AS packages
WORKDIR /build
# Only what runs in production: requirements.lock has the test tools and the embedded servers besides.
COPY requirements-runtime.lock ./
RUN python -m venv /packages && \
    /packages/bin/pip install --no-cache-dir --disable-pip-version-check --no-compile --require-hashes \
        --requirement requirements-runtime.lock

FROM python:3.11-slim
WORKDIR /app
ENV PATH=/packages/bin:$PATH PYTHONUNBUFFERED=1
COPY --from=packages /packages /packages
COPY alembic.ini settings.py clients.py logs.py worker.py ./
COPY domain domain
COPY telemetry telemetry
COPY storage storage
COPY activities activities
COPY workflows workflows
COPY engine engine
COPY market market
COPY monitors monitors
COPY reporting reporting
COPY api api
RUN python -m compileall -q . /packages
ENV PYTHONDONTWRITEBYTECODE=1
USER 10001
HEALTHCHECK --interval=10s --timeout=6s --start-period=30s --retries=3 CMD ["python", "-m", "telemetry.probe"]
CMD ["python", "-m", "api"]

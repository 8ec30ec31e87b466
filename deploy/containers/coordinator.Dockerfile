# The coordinator, and the operator's command `silotune` with it. From the repository root:
#
#   docker build -f deploy/containers/coordinator.Dockerfile -t silotune-coordinator .
#
# It runs as uid 10001, writes below /data only, and goes with --read-only, --cap-drop ALL and --tmpfs /tmp.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
ARG EXTRAS=coordinator
WORKDIR /build
COPY . .
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --no-compile -c constraints.txt ".[${EXTRAS}]"

FROM ${BASE_IMAGE}
RUN groupadd --gid 10001 silotune \
    && useradd --uid 10001 --gid 10001 --home-dir /data --no-create-home --shell /usr/sbin/nologin silotune \
    && install --directory --owner 10001 --group 10001 --mode 0700 /data
COPY --from=build /venv /venv
ENV HOME=/data \
    PATH=/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /data
# 9443 agents and operators, 9444 enrollment. Metrics and health (9480) stay on loopback inside the container, unless
# coordinator.toml says otherwise.
EXPOSE 9443 9444
HEALTHCHECK --interval=15s --timeout=5s --start-period=20s --retries=4 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9480/healthz', timeout=4)"]
ENTRYPOINT ["silotune-coordinator"]
CMD ["serve", "--data", "/data/coordinator"]

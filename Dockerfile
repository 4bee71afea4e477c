# One image for every group of a cluster; docs/image.md says how to build and use it.
# Plain instructions only (no BuildKit extensions), so that docker, podman, buildah and kaniko build it.
#
# CPU (default):  BASE_IMAGE=debian, TORCH_INDEX=PyTorch's CPU wheels
# GPU:            BASE_IMAGE=nvidia/cuda:...-base-ubuntu24.04, TORCH_INDEX="" (PyPI's CUDA wheels), EXTRAS=[gpu],
#                 RUNTIME_PACKAGES="gcc libc6-dev python3-dev" (Triton compiles its launchers where they run)
ARG BASE_IMAGE=docker.io/library/debian:12.12-slim

# -- wheels are unpacked here; nothing of this stage but /opt/whalepod and /models goes on ---------
FROM ${BASE_IMAGE} AS build
# Versions come with the base image, which differs by flavour; pin it by digest for a fixed set.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
# pip reads these itself; an empty one counts as unset. See "Air-gapped" in docs/image.md.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PIP_INDEX_URL
ARG PIP_NO_INDEX
ARG PIP_FIND_LINKS
ARG EXTRAS=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_EXTRA_INDEX_URL=${TORCH_INDEX}
RUN python3 -m venv --without-pip /opt/whalepod && python3 -m venv /opt/pip
WORKDIR /source
COPY . .
# The wheel is built from the checkout and installed; the checkout itself stays behind.
RUN /opt/pip/bin/pip wheel --quiet --no-deps --wheel-dir /wheel . \
    && /opt/pip/bin/pip --python /opt/whalepod/bin/python install --quiet \
        --constraint constraints.txt "$(echo /wheel/whalepod-*.whl)${EXTRAS}" \
    && mkdir -p /models && if [ -d models/demo ]; then cp -r models/demo /models/; fi \
    && chmod -R a+rX /opt/whalepod /models

# -- what runs: an interpreter, the environment, and what KubeRay's probes call (bash, wget, grep) --
FROM ${BASE_IMAGE}
ARG VERSION=0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="whalepod" \
    org.opencontainers.image.description="Serves DeepSeek-V4 on Ray with attention and experts on separate actors" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
ARG RUNTIME_PACKAGES=
# libibverbs: NCCL loads it when a node has RDMA devices. The last variable is several words.
# hadolint ignore=DL3008,SC2086
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        bash ca-certificates grep ibverbs-providers libibverbs1 python3 wget ${RUNTIME_PACKAGES} \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --non-unique --gid 1000 whalepod \
    && useradd --non-unique --uid 1000 --gid 1000 --create-home --shell /bin/bash whalepod
COPY --from=build /opt/whalepod /opt/whalepod
COPY --from=build /models /models
# A login shell resets PATH, and KubeRay can be told to use one.
RUN ln -s /opt/whalepod/bin/python /opt/whalepod/bin/ray /opt/whalepod/bin/whalepod \
        /opt/whalepod/bin/serve /usr/local/bin/
ENV PATH=/opt/whalepod/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/home/whalepod \
    USER=whalepod \
    LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_AUTH_MODE=token \
    RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0 \
    RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /home/whalepod
USER 1000:1000
# Kubernetes probes by itself, differently for each group.
HEALTHCHECK NONE
CMD ["whalepod", "--help"]

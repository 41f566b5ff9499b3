# Two images: the CUDA build of torch (default) and the CPU's. Needs BuildKit, which docker has had on since version 23.
#
#   docker build --tag stepdistill .
#   docker build --tag stepdistill:cpu --target cpu .
#   docker run --rm --gpus all --user "$(id -u)" --volume "$PWD:/work" --volume stepdistill:/cache \
#     stepdistill train recipe.yaml
#
# The driver is the host's (NVIDIA Container Toolkit); torch's wheels bring CUDA's libraries.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm AS base
# Triton and torch.compile call a C compiler while a program runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git \
    && rm -rf /var/lib/apt/lists/*
# For a user of any number, who has no home: what is downloaded or compiled goes to /cache.
RUN mkdir --mode=1777 /work /cache
ENV HOME=/cache USER=stepdistill
COPY . /opt/stepdistill
WORKDIR /work

FROM base AS cpu
# torch from its own index first, or the next line would fetch the CUDA build.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch torchvision \
    && pip install --no-cache-dir '/opt/stepdistill[eval,data,demo]'
USER 1000
ENTRYPOINT ["stepdistill"]
CMD ["--help"]

FROM base AS cuda
# hadolint ignore=DL3013
RUN pip install --no-cache-dir torch torchvision \
    && pip install --no-cache-dir '/opt/stepdistill[eval,data,demo]'
USER 1000
ENTRYPOINT ["stepdistill"]
CMD ["--help"]

# Two images of Capstan, with the versions that constraints.txt pins.
#
#   docker build --target cpu -t capstan:cpu .   build, select, remove, report: no torch
#   docker build --target gpu -t capstan:gpu .   captions and training too
#
# The targets of clusters.yaml name them: `image` of the kinds kuberay, ray and aws.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
WORKDIR /opt/capstan
COPY . .
RUN pip install --constraint constraints.txt .
RUN useradd --create-home capstan
USER capstan
WORKDIR /home/capstan
CMD ["capstan", "--help"]

FROM cpu AS gpu
USER root
# DeepSpeed compiles its shared-memory all-reduce at its first start.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --constraint /opt/capstan/constraints.txt '/opt/capstan[all]'
USER capstan

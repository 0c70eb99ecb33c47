# The server on a slim base, as a user without rights. Build: docker build -t clearfold .
FROM python:3.12-slim-bookworm AS build
# `cpu` installs torch without CUDA; `auto` or a CUDA version (cu130) installs it for a GPU.
ARG TORCH_BACKEND=cpu
ENV PYTHONDONTWRITEBYTECODE=1 UV_TORCH_BACKEND=${TORCH_BACKEND} UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends make git \
    && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir "uv>=0.9,<1"
WORKDIR /opt/clearfold
# The dependencies first: they change less often than the code.
COPY pyproject.toml Makefile README.md ./
COPY client ./client
COPY app ./app
COPY fusion ./fusion
COPY lrp ./lrp
COPY models ./models
RUN make venv

FROM python:3.12-slim-bookworm
RUN useradd --uid 10001 --create-home clearfold \
    && mkdir /data \
    && chown clearfold /data
COPY --from=build /opt/clearfold /opt/clearfold
WORKDIR /opt/clearfold
ENV PATH=/opt/clearfold/.venv/bin:$PATH PYTHONUNBUFFERED=1 CLEARFOLD_DATA=/data CLEARFOLD_HOST=0.0.0.0
USER 10001
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=90s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
CMD ["clearfold", "serve"]

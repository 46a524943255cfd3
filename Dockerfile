# CPU: docker build -t f2pad .
# NVIDIA GPUs: docker build -t f2pad --build-arg EXTRAS=demo,cuda .
# Use, on a GPU with --gpus all: docker run --rm -v "$PWD:/data" -v f2pad-cache:/cache f2pad refine part.model new_images/ --out out/
FROM python:3.11-slim
ARG EXTRAS=demo
RUN --mount=type=bind,target=/source,rw pip install --no-cache-dir "/source[$EXTRAS]"
# weights and compiled programs; a named volume keeps them for later runs
ENV XDG_CACHE_HOME=/cache
RUN useradd --create-home f2pad && mkdir /cache /data && chown f2pad /cache /data
USER f2pad
VOLUME /cache
WORKDIR /data
ENTRYPOINT ["f2pad"]
CMD ["--help"]

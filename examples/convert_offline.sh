#!/usr/bin/env bash
# Convert a GGUF of SmolLM2 on a machine without a network that only small files reach, as a rented
# GPU may be: `examples/convert_offline.sh softpick 9 unseen.txt` in a folder with
#
#   smollm2.gguf.*  the model in parts: split -b 55MB SmolLM2-135M-Instruct.Q4_1.gguf smollm2.gguf.
#   tokens.npy      what to train on, of python -m training.tokens
#   unseen.txt      a text to measure on
#
# trains for 9 minutes and leaves result.tar.*, parts of at most 60 MB: the weights in 4 bits, and the
# page of what the change did. Interrupted, it goes on. More arguments are options of training.convert.
# Python must find this project: in another folder than a checkout's, PYTHONPATH names that.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "convert_offline.sh: name a variant, minutes and a text: softpick 9 unseen.txt" >&2
    exit 2
fi
variant=$1 minutes=$2 text=$3
for file in tokens.npy "$text"; do
    if [ ! -f "$file" ]; then
        echo "convert_offline.sh: $file is not here: see the head of this script" >&2
        exit 2
    fi
done
out=smollm2-$variant

[ -d smollm2 ] || {
    cat smollm2.gguf.* > smollm2.gguf
    python -m benchmarks.smollm2 smollm2.part --gguf smollm2.gguf
    mv smollm2.part smollm2
}
[ -d "$out" ] || python -m training.convert smollm2 "$out" --variant "$variant" --train all \
    --minutes "$minutes" --data tokens.npy --distill 1 --learning-rate 2e-4 --precision bf16 "${@:4}"
[ -d "$out-4bit" ] || python -m quant.quantize "$out" "$out-4bit" --bits 4 --embeddings 6
mkdir -p page
cp "$out/conversion.json" page
failed=0
python -m training.compare smollm2 "$out" --text "$text" --out page --quick || failed=$?
rm -f result.tar.*
tar -c "$out-4bit" page | split -b 60MB - result.tar.
exit $failed  # of what could not be measured, which the page names

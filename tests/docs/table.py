"""How the tests run each command of the texts.

A command that is not here fails `test_coverage.py`, and so does an entry that no text has any more.
A command without options in a sentence or a table names a program: it is covered where a longer one
here begins with it.
"""

from __future__ import annotations

from tests.docs.rules import (
    CHECKPOINTS,
    Asked,
    Elsewhere,
    NotHere,
    Printed,
    Rule,
    Run,
    Serve,
    attnserve_serve,
    make_serve,
)
from tests.docs.text import Command, normal

BOOKS = r"--books"
"""What a command says that truly needs the thirteen novels."""
SMALL = "--sequences 2 --length 64"
SWEEP_ONE = (
    f"python -m quant.sweep checkpoints/softpick --bits 4 {SMALL} --schemes rtn --what weights "
    "--calibration 2 --jobs 1"
)
YOUR_LLAMA = "python -m tests.docs.prepare plain-llama your-llama"
PACKED = r"all +[1-9][\d,]+ "
BUDGETS = r"times less memory"
COLLECTED = r"[1-9]\d*(/\d+)? tests? collected"
MY_MODEL = "python examples/train_llama.py --text docs/*.md --steps 2 "
RELU = "python -m tests.docs.prepare relu kernels/attn_kernels/variants/relu"
SEARCH = (
    "--sequences 2 --judge 2 --test-sequences 2 --length 64 --step 32 --uniform 16 "
    "--out my-budgets --runs my-runs"
)
MY_TOKENIZER = "python -m training.tokenizer --data docs/*.md --out my-tokenizer"
VLLM = "--host 127.0.0.1 --port {vllm} --enforce-eager --kv-cache-memory-bytes 64M"

RULES: dict[str, Rule] = {
    # README.md
    "make serve": Serve(make_serve("checkpoints/softpick"), slow=False),
    "make test": Run("make test ARGS='-n 0 tests/docs/test_parser.py'", r"\d passed", long=True),
    "make serve VLLM_PORT=8001": Serve(
        "make serve VLLM_PORT={vllm} GATEWAY_PORT={gateway} CKPT=checkpoints/ssmax"
    ),
    "make TORCH_INDEX=URL": Run(
        "make TORCH_INDEX=https://download.pytorch.org/whl/cpu", prints="Nothing to be done"
    ),
    "curl http://127.0.0.1:8080/v1/completions -H 'Content-Type: application/json' -d "
    '\'{"model": "softpick", "prompt": "It was the best of times,", "max_tokens": 32}\'': Asked(),
    "attnserve doctor": Run(prints="kernel cache"),
    "attnserve --help": Run(prints="sweep"),
    "attnserve --install-completion": NotHere("a shell whose settings it may change"),
    "attnserve serve CKPT": Serve(attnserve_serve("checkpoints/lssar")),
    "make test-fast": Run("make test-fast ARGS='--collect-only -q'", r"\d tests collected"),
    "pip install pre-commit && pre-commit install": NotHere("a package index"),
    "pip install uv": NotHere("a package index"),
    "pip install .": Elsewhere("tests/test_packaging.py"),
    "pip install '.[cuda]'": NotHere("a GPU, and a package index"),
    "pip install '.[cpu]' --extra-index-url https://download.pytorch.org/whl/cpu": NotHere(
        "a package index"
    ),
    "vllm serve CKPT --hf-overrides "
    '\'{"attention_variant": {"name": "selective", "kv_budgets": [24, 40, 8, 72]}}\'': Serve(
        f"vllm serve checkpoints/selective {VLLM} --hf-overrides "
        '\'{{"attention_variant": {{"name": "selective", "kv_budgets": [24, 40, 8, 72]}}}}\''
    ),
    "vllm serve CKPT --attention-backend softpick": Serve(
        f"vllm serve your-llama {VLLM} --attention-backend softpick",
        setup=YOUR_LLAMA,
    ),
    "python -m quant.quantize CKPT OUT --bits 4 --embeddings 8": Run(
        "python -m quant.quantize checkpoints/lssa OUT --bits 4 --embeddings 8 "
        "--calibration 2 --length 64",
        prints=PACKED,
    ),
    "python -m tests.vllm_quant.test_formats": Elsewhere("tests/vllm_quant/test_formats.py"),
    "vllm serve model.gguf": Run(
        "printf GGUF > served.gguf; vllm serve served.gguf",
        prints="is a GGUF file, which vLLM does not read",
        code=1,
    ),
    "python -m quant.convert model.gguf OUT": Run(
        f"{YOUR_LLAMA} && python -m quant.quantize your-llama model.gguf --bits 4 --scheme rtn "
        "--format gguf && python -m quant.convert model.gguf OUT-of-gguf",
        prints=r"14 layers as they are, 0 dequantized",
    ),
    "make serve CKPT=OUT": Serve(
        make_serve("out-4bit"),
        setup="python -m quant.quantize checkpoints/softpick out-4bit --bits 4 --scheme rtn",
    ),
    "python -m quant.sweep --bits 2 3 4 8": Run(
        f"python -m quant.sweep --bits 4 {SMALL} --schemes rtn --what weights "
        f"--calibration 2 --jobs 1 && {SWEEP_ONE}",
        prints=r"(?s)selective_prunable.*Report: .*Report: ",
        slow=True,
        long=True,
    ),
    "python -m quant.sweep CKPT": Run(
        SWEEP_ONE,
        prints=r"(?s)softpick +weights .*Report: ",
        long=True,
    ),
    "make serve CKPT=softpick-340M-4096-model": Serve(
        make_serve("softpick-340M-4096-model"),
        setup="python -m tests.docs.prepare published softpick-340M-4096-model",
    ),
    "make checkpoints": Run(prints=BOOKS, code=2, long=True),
    "make analyze": Run(
        "make analyze ARGS='--measures perplexity --limit 1'", prints=BOOKS, code=2, long=True
    ),
    "python -m training": Run(prints="convert"),
    "attnserve evaluate checkpoints/softpick --text README.md": Run(prints="README"),
    "attnserve evaluate CKPT": Run(
        "attnserve evaluate checkpoints/softpick --sequences 2",
        prints="per token",
    ),
    "attnserve look checkpoints/softmax checkpoints/softpick --text README.md": Run(
        prints="Page: look.html"
    ),
    "python -m training.train --help": Run(prints="Usage"),
    "attnserve budgets CKPT": Run(
        "attnserve budgets checkpoints/selective --sequences 2 --judge 2 "
        "--test-sequences 2 --length 64 --step 32 --uniform 16 --out budgets --runs budget-runs",
        prints=BUDGETS,
        long=True,
    ),
    "make bench": Run(
        "make bench ARGS='--only kernels --no-save'", prints="of limit", slow=True, long=True
    ),
    "python -m benchmarks.kernels": Run(
        "python -m benchmarks.kernels --quick --variants softmax --phases decode --dtypes fp32 "
        "--head-dims 64 --ctx 64 --batch 1 --seconds 0.1 --no-save",
        prints="of limit",
        slow=True,
    ),
    "make bench-kernels": Run(
        "make bench-kernels ARGS='--quick --variants softmax --phases decode --dtypes fp32 "
        "--head-dims 64 --ctx 64 --batch 1 --seconds 0.1 --no-save'",
        prints="of limit",
        slow=True,
        long=True,
    ),
    "python -m benchmarks.gateway": Run(
        "python -m benchmarks.gateway --gateways attnserve --requests 8 --rounds 1 "
        "--concurrency 2 --tokens 4 --no-save",
        prints="CPU ms",
        slow=True,
    ),
    "python -m benchmarks.serve --enforce-eager": Run(
        "python -m benchmarks.serve --enforce-eager --ckpts checkpoints/softmax --gateway none "
        "--no-stock --requests 4 --rounds 1 --request-rates inf --prompt-len 16 --new-tokens 4 "
        "--no-save",
        prints="tokens/s",
        slow=True,
        long=True,
    ),
    "python -m benchmarks.serve --ckpts DIR --backends cpu_attn softmax --concurrency 1 8": Run(
        "python -m benchmarks.serve --ckpts checkpoints/softmax --backends softmax "
        "--concurrency 1 2 --requests 4 --rounds 1 --prompt-len 16 --new-tokens 4 --gateway none "
        "--enforce-eager --no-save",
        prints="2 at a time",
        slow=True,
        long=True,
    ),
    "python -m benchmarks.serve --ckpts DIR --packed w2 w3 w4 w8 --dtypes float32 bfloat16 "
    "--no-stock --gateway none --concurrency 1 --prompt-len 64 --new-tokens 64 --rounds 11 "
    "--threads 1": Run(
        "python -m quant.quantize checkpoints/softmax bench-4bit --bits 4 --scheme rtn && "
        "python -m benchmarks.serve --ckpts checkpoints/softmax --packed bench-4bit "
        "--dtypes float32 --concurrency 1 --requests 4 --rounds 1 --prompt-len 16 --new-tokens 4 "
        "--gateway none --enforce-eager --no-save",
        prints="bench-4bit",
        slow=True,
        long=True,
    ),
    "python -m benchmarks.serve --ckpts DIR --no-stock --gateway none --request-rates inf "
    "--running --kv-cache-memory-bytes 20M --requests 240 --prompt-len 64 --new-tokens 416 "
    "-- --max-num-seqs 512": Run(
        "python -m benchmarks.serve --ckpts checkpoints/selective --no-stock --gateway none "
        "--request-rates inf --running --kv-cache-memory-bytes 8M --requests 16 --rounds 1 "
        "--new-tokens 64 --enforce-eager --no-save -- --max-num-seqs 512",
        prints="in flight",
        slow=True,
        long=True,
    ),
    "python -m benchmarks.memory": Run(
        "python -m benchmarks.memory --enforce-eager --ckpts checkpoints/softmax --prompt-len 64 "
        "--new-tokens 16 --no-save",
        prints="requests in flight",
        slow=True,
        long=True,
    ),
    "vllm bench serve": Elsewhere("tests/benchmarks/test_serve.py"),
    "attnserve was tried on vLLM 0.32 to 0.33, not on ...": Printed(),
    "python -m serving --help": Run(prints="UPSTREAM_URL"),
    "pip uninstall torchvision torchaudio torchcodec": Run(
        "pip uninstall --yes torchvision torchaudio torchcodec", prints="not installed"
    ),
    "pip check": Run(prints="requires torchvision, which is not installed", code=1),
    "apt-get install libnuma1": NotHere("root"),
    # CONTRIBUTING.md
    'make test ARGS="-k softpick"': Run(
        "make test ARGS='-n 0 -k softpick tests/attn_kernels/test_registry.py'", r"\d passed"
    ),
    "make test-slow": Run(
        "make test-slow ARGS='--collect-only -q tests/serving/test_idle_connections.py'",
        prints=COLLECTED,
        slow=True,
        long=True,
    ),
    "make test-gpu": NotHere("a GPU"),
    "make lint": Run(prints=r"(?s)All checks passed!.*formatted.*no issues", slow=True),
    "make format": Run(prints=r"(?s)All checks passed!.*left unchanged"),
    "make clean": Run("make clean VENV=other-venv", prints="rm -rf other-venv"),
    "make install": Run(prints="Nothing to be done"),
    "make lock": NotHere("a package index"),
    "make doctor": Run(prints="kernel cache"),
    # models/*/README.md
    "python -m training.convert smollm2 smollm2-softpick --variant softpick --train all "
    "--minutes 40 --compile --data chats.jsonl chats.jsonl prose.npy --distill 1 --precision bf16 "
    "--sequence 1024 --batch 2 --learning-rate 2e-4": Elsewhere("tests/training/test_convert.py"),
    "python -m quant.quantize smollm2-softpick models/smollm2-softpick --bits 4 --embeddings 6": (
        Elsewhere("tests/test_pretrained.py")
    ),
    "make serve CKPT=models/smollm2-softpick": Serve(make_serve("models/smollm2-softpick")),
    # checkpoints/*/README.md
    **{
        f"vllm serve checkpoints/{name} --attention-backend {variant}": Serve(
            f"vllm serve checkpoints/{name} --attention-backend {variant} {VLLM}"
        )
        for name, variant in CHECKPOINTS.items()
    },
    **{
        f"attnserve evaluate checkpoints/{name} --whole --ngrams": Run(
            prints=BOOKS, code=2, slow=name != "softpick"
        )
        for name in CHECKPOINTS
    },
    **{
        f"python -m training.checkpoints {name}": Run(
            prints=BOOKS, code=2, long=True, slow=name != "softpick"
        )
        for name in CHECKPOINTS
    },
    # docs/BENCHMARKS.md
    "python -m benchmarks": Run(
        "python -m benchmarks --only gateway --no-save", prints="CPU ms", slow=True, long=True
    ),
    "python -m benchmarks.serve --enforce-eager --level chat=1000:150 --ckpts BIG "
    "--gateway none": Run(
        "python -m benchmarks.serve --enforce-eager --level chat=1000:150 "
        "--ckpts checkpoints/softmax --gateway none --no-stock --requests 4 --rounds 1 "
        "--request-rates inf --prompt-len 16 --new-tokens 4 --no-save",
        prints="goodput chat",
        slow=True,
        long=True,
    ),
    "python -m benchmarks.smollm2": Run(
        "python -m benchmarks.smollm2 smollm2", prints="SmolLM2-135M-Instruct in float32", slow=True
    ),
    # docs/DEPLOY.md
    **dict.fromkeys(
        (
            "docker build -f docker/cpu.Dockerfile -t attnserve:cpu .",
            "docker build -f docker/cuda.Dockerfile -t attnserve:cuda .",
            "docker run --rm -p 127.0.0.1:8000:8000 --shm-size 1g attnserve:cpu",
            "docker run --rm -p 127.0.0.1:8000:8000 -v /models:/models:ro attnserve:cpu "
            "vllm serve /models/mine --served-model-name=mine --host=0.0.0.0 --enforce-eager",
            "docker compose -f docker/compose.yaml up --build",
            "docker compose -f docker/compose.yaml -f docker/compose.cuda.yaml up --build",
        ),
        NotHere("a Docker engine"),
    ),
    **{
        f"kubectl apply -k deploy/kubernetes/{name}": NotHere("a Kubernetes cluster")
        for name in ("base", "cuda", "servicemonitor")
    },
    "helm install attnserve vllm/vllm-stack -f deploy/production-stack/values.yaml": NotHere(
        "helm and a Kubernetes cluster"
    ),
    "apt-get install buildah debootstrap": NotHere("root"),
    'WHEELS=/folder/with/torch tools/build_image.sh /tmp/image "avx512 avx2"': NotHere(
        "buildah, debootstrap and root"
    ),
    "make images-check": NotHere("a package index"),
    "docker-compose config": Elsewhere("tests/test_images.py"),
    "kubectl kustomize": Elsewhere("tests/test_images.py"),
    # docs/GATEWAY.md; gateway.yaml is the page's own example (test_snippets.py)
    "attnserve-gateway --config gateway.yaml": Serve(
        "attnserve-gateway --config gateway.yaml",
        setup="python -m tests.docs.prepare gateway gateway.yaml {gateway}",
        path="/metrics",
        slow=False,
    ),
    "attnserve-gateway --config gateway.yaml --check-config": Run(
        "python -m tests.docs.prepare gateway gateway.yaml && "
        "attnserve-gateway --config gateway.yaml --check-config",
        prints="gateway.yaml is good",
    ),
    'make serve VLLM_ARGS="--chat-template checkpoints/softmax/chat_template.jinja"': Serve(
        make_serve("checkpoints/softpick")
        + ' VLLM_ARGS="--chat-template checkpoints/softmax/chat_template.jinja"'
    ),
    "attnserve serve checkpoints/softpick -- "
    "--chat-template checkpoints/softmax/chat_template.jinja": Serve(
        attnserve_serve("checkpoints/softpick")
        + " -- --chat-template checkpoints/softmax/chat_template.jinja"
    ),
    "attnserve keys new alice": Run(prints="sha256: [0-9a-f]{64}"),
    "make conformance": NotHere("a package index"),
    **{
        f"pytest -m slow tests/serving/test_{name}.py": Run(
            f"pytest -m slow --collect-only -q tests/serving/test_{name}.py",
            prints=COLLECTED,
            slow=True,
            long=True,
        )
        for name in ("abort", "idle_connections", "killed_servers")
    },
    "make sanitize": Run("make sanitize ARGS='-k overflow'", prints="1 passed", slow=True),
    "make soak": Run(
        "make soak ARGS='--streams 20 --seconds 10 --tokens 10 --pause-s 0.1'",
        prints='"ok": true',
        slow=True,
        long=True,
    ),
    # docs/GPU.md
    "make test ARGS=tests/attn_kernels/test_triton.py": Run(
        "make test ARGS='-n 0 --collect-only -q tests/attn_kernels/test_triton.py'",
        prints=COLLECTED,
        slow=True,
    ),
    "make test ARGS=tests/attn_kernels/test_training.py": Run(
        "make test ARGS='-n 0 --collect-only -q tests/attn_kernels/test_training.py'",
        prints=COLLECTED,
        slow=True,
    ),
    "make test ARGS=tests/quant_kernels/test_triton.py": Run(
        "make test ARGS='-n 0 --collect-only -q tests/quant_kernels/test_triton.py'",
        prints=COLLECTED,
        slow=True,
    ),
    "make compile-kernels": Run(
        "make compile-kernels ARGS='--no-save --match \"sm_90 64 bfloat16 softpick decode\"'",
        prints="softpick",
        slow=True,
        long=True,
    ),
    "python -m benchmarks.triton_compile": Run(
        "python -m benchmarks.triton_compile --no-save --match 'sm_90 64 bfloat16 softpick deco'",
        prints="registers_to_vllm",
        slow=True,
        long=True,
    ),
    "python -m benchmarks.triton_compile --packed": Run(
        "python -m benchmarks.triton_compile --packed --match 'sm_90 bfloat16 4 1$' --no-save",
        prints="registers",
        slow=True,
        long=True,
    ),
    "python -m benchmarks.triton_compile --training": Run(
        "python -m benchmarks.triton_compile --training --match 'sm_90 64 bf.* softmax$' --no-save",
        prints="registers",
        slow=True,
        long=True,
    ),
    "vllm serve CKPT --attention-backend NAME": NotHere("a GPU"),
    "make gpu-check": NotHere("a GPU"),
    "python -m benchmarks.gpu": NotHere("a GPU"),
    "python -m benchmarks.gpu_training": NotHere("a GPU"),
    "python -m benchmarks.gpu_packed": NotHere("a GPU"),
    "python -m benchmarks.gpu_serving": NotHere("a GPU"),
    "python -m benchmarks.gpu_check": NotHere("a GPU"),
    "attnserve tune": NotHere("a GPU"),
    "python -m benchmarks.triton_compile.candidates --arch sm_90 --out FILE": Run(
        "python -m benchmarks.triton_compile.candidates --arch sm_90 --variants softpick --most 1 "
        "--phases decode --out candidates.jsonl",
        prints="softpick",
        slow=True,
        long=True,
    ),
    "python -m benchmarks.triton_compile.tables": Run(prints="nothing was measured"),
    # docs/QUANT.md
    "python -m quant": Run(prints="sensitivity"),
    **{
        f"pip install -e '.[{extra}]'": Run(
            f"pip install --no-deps --no-build-isolation -e '.[{extra}]'",
            prints="Successfully installed attnserve",
        )
        for extra in ("quant-libraries", "lm-eval", "ray")
    },
    "python -m quant.report": Run(
        "python -m quant.report --results quant/results", prints="Report: quant/results/report.html"
    ),
    "python -m quant.sensitivity checkpoints/softpick --budget 1300000": Run(
        "python -m quant.sensitivity checkpoints/softpick --budget 1300000 --bits 2 4 "
        "--scheme rtn --sequences 1 --length 64 --calibration 1 --out sensitivity",
        prints="Written: sensitivity/softpick-rtn-g64.json",
        slow=True,
        long=True,
    ),
    "python -m quant.sweep checkpoints/softmax checkpoints/softpick --schemes bnb-nf4 "
    "hqq-library --bits 4 --targets weights": NotHere("bitsandbytes and hqq"),
    "python -m quant.sweep checkpoints/softmax checkpoints/softpick --schemes bnb-int8 "
    "--bits 8 --group-sizes channel --symmetric --targets weights": NotHere("bitsandbytes"),
    "HF_HUB_OFFLINE=1 python -m quant.sweep checkpoints/softpick --out results-lm-eval "
    "--lm-eval arc_easy mine --lm-eval-include tasks --lm-eval-limit 200": NotHere("lm-eval"),
    "python -m quant.quantize checkpoints/softpick softpick-4bit --bits 4 --embeddings 8": Run(
        "python -m quant.quantize checkpoints/softpick softpick-4bit --bits 4 "
        "--embeddings 8 --calibration 2 --length 64",
        prints=PACKED,
        slow=True,
    ),
    "vllm serve softpick-4bit": Serve(
        f"vllm serve softpick-4bit-served {VLLM}",
        setup="python -m quant.quantize checkpoints/softpick softpick-4bit-served --bits 4 "
        "--scheme rtn --embeddings 8",
    ),
    **{
        f"vllm serve checkpoints/softpick --kv-cache-dtype {dtype}": Serve(
            f"vllm serve checkpoints/softpick {VLLM} --kv-cache-dtype {dtype}"
        )
        for dtype in ("int8_per_token_head", "int4_per_token_head")
    },
    "python -m quant.quantize checkpoints/softpick softpick-kv8 --kv-cache-dtype "
    "int8_per_token_head": Run(prints=r"all +3,688,704"),
    "python -m quant.quantize CKPT OUT --bits-per-weight 2.5": Run(
        "python -m quant.quantize checkpoints/softpick OUT-2.5 --bits-per-weight 2.5 "
        "--calibration 2 --length 64",
        PACKED,
        slow=True,
    ),
    "python -m quant.convert --format gguf": Elsewhere("tests/quant/test_convert.py"),
    "pip install --no-deps": NotHere("a network"),
    "python -m benchmarks.kernels --phases write --kv-formats int8_per_token_head "
    "int4_per_token_head": Elsewhere("tests/benchmarks/test_kernels_command.py"),
    "python -m benchmarks.quantization --books BOOKS": NotHere("the thirteen novels, llama.cpp"),
    "python -m benchmarks.packed_products": Run(
        "python -m benchmarks.packed_products --bits 4 --rounds 1 --no-save",
        prints="x_bfloat16_median",
        slow=True,
    ),
    "python -m benchmarks.engines --packed w4 --ckpt smollm2 --gguf q4_0.gguf "
    "--llama-python llama/bin/python": NotHere("llama-cpp-python"),
    # docs/RESULTS.md
    "python -m training.learning_rate": Run(prints=BOOKS, code=2, slow=True),
    "python -m training.convert": Elsewhere("tests/training/test_convert.py"),
    "python -m training.long_context": Run(
        "python -m training.long_context --dtype bfloat16", prints="smollm2-softmax", slow=True
    ),
    "python -m training.report": Run(prints=r"paper +claim +verdict", slow=True),
    "python -m training.analyze checkpoints/*": Run(prints=BOOKS, code=2, slow=True),
    # docs/CLIENTS.md
    "curl http://127.0.0.1:8080/v1/models": Asked(),
    **{
        f"curl {flags}http://127.0.0.1:8080/v1/{route} -H 'Content-Type: application/json' "
        f'-d \'{{"model": "softpick", {body}}}\'': Asked()
        for flags, route, body in (
            ("", "completions", '"prompt": "The old man looked at", "max_tokens": 32'),
            (
                "",
                "chat/completions",
                '"messages": [{"role": "user", "content": "Who is there?"}], "max_tokens": 32',
            ),
            (
                "-N ",
                "completions",
                '"prompt": "The old man looked at", "max_tokens": 32, "stream": true',
            ),
        )
    },
    "docker run --network=host -e PORT=3000 -e ENABLE_OLLAMA_API=false "
    "-e OPENAI_API_BASE_URL=http://127.0.0.1:8080/v1 -e OPENAI_API_KEY=none "
    "-v open-webui:/app/backend/data ghcr.io/open-webui/open-webui:main": NotHere(
        "a Docker engine and a network"
    ),
    # docs/INSTALL.md
    "python tools/try_vllm.py 0.33.0": NotHere("a network"),
    # docs/MODELS.md, docs/PYTHON.md
    "source .venv/bin/activate": Run(
        'source .venv/bin/activate && echo "$VIRTUAL_ENV_PROMPT"', prints=r"\(\.venv\)"
    ),
    "vllm serve your-llama --attention-backend softpick": Serve(
        f"vllm serve your-llama {VLLM} --attention-backend softpick",
        setup=YOUR_LLAMA,
    ),
    # docs/TRAINING.md
    "python examples/train_llama.py my-model --variant softpick --text docs/*.md": Run(
        "python examples/train_llama.py my-model --variant softpick --text docs/*.md --steps 20",
        prints="wrote my-model",
    ),
    "python examples/train_with_trainer.py my-trainer-model --variant lssa --text docs/*.md": Run(
        "python examples/train_with_trainer.py my-trainer-model --variant lssa --text docs/*.md "
        "--steps 20",
        prints="wrote my-trainer-model",
    ),
    "pip install accelerate": Run("pip install --no-deps --no-index accelerate", prints="already"),
    MY_TOKENIZER: Run(prints="tokens from"),
    "python -m training.train --variant lssar --data docs/*.md --tokenizer my-tokenizer "
    "--out my-run --compile": Run(
        f"{MY_TOKENIZER} && "
        "python -m training.train --variant lssar --data docs/*.md --tokenizer my-tokenizer "
        "--out my-run --steps 2 --context 64 --layers 1 --hidden-size 64 --heads 2 --kv-heads 2",
        prints="my-run/model",
        long=True,
    ),
    "python -m training.convert your-llama your-ssmax --variant ssmax": Run(
        f"{YOUR_LLAMA} && python -m training.convert your-llama your-ssmax --variant ssmax",
        prints="with ssmax attention",
    ),
    "python -m training.compare your-llama your-ssmax --text unseen.txt --out my-page --quick": Run(
        f"{YOUR_LLAMA} && python -m training.convert your-llama compared --variant ssmax && "
        "python -m training.compare your-llama compared --text LICENSE --out my-page --quick "
        "--context 256 --max-length 512 --sequence 64",
        prints="Page: my-page/page.md",
        slow=True,
        long=True,
    ),
    "python -m benchmarks.smollm2 smollm2": Run(
        "python -m benchmarks.smollm2 smollm2-bf16 --dtype bfloat16",
        prints="SmolLM2-135M-Instruct in bfloat16",
        slow=True,
        long=True,
    ),
    "python -m training.convert smollm2 smollm2-softpick --variant softpick --train all "
    "--minutes 40 --data chats.jsonl prose.txt --distill 1 --learning-rate 2e-4 --precision bf16 "
    "--compile --batch 2": Run(
        f"{YOUR_LLAMA} && python -m training.convert your-llama smollm2-softpick "
        "--variant softpick --train all --steps 2 --data LICENSE --distill 1 --learning-rate 2e-4 "
        "--precision bf16 --compile --batch 2 --sequence 64",
        prints="with softpick attention",
        slow=True,
        long=True,
    ),
    "python -m training.convert smollm2 smollm2-selective --variant selective --train all "
    "--minutes 38 --data chats.jsonl chats.jsonl prose.txt --distill 1 --learning-rate 2e-4 "
    "--precision bf16 --compile --sequence 2048 --memory-loss 0.5": Elsewhere(
        "tests/training/test_convert.py"
    ),
    "attnserve budgets smollm2-selective --reference smollm2 --text unseen.txt --length 2048 "
    "--sequences 2 --judge 4 --test-sequences 4 --uniform 128 --uniform 512 --rise 1 "
    "--rise 3": Elsewhere("tests/training/test_budgets.py"),
    "examples/convert_offline.sh selective 9 unseen.txt --sequence 2048 --memory-loss 0.5": Run(
        "mkdir offline && python -m tests.docs.prepare plain-llama offline/smollm2 && "
        "cp LICENSE offline/unseen.txt && export PYTHONPATH=$PWD && cd offline && "
        "python -m training.tokens smollm2 tokens.npy --data ../LICENSE && "
        "../examples/convert_offline.sh selective 0.05 unseen.txt --sequence 64 --memory-loss 0.5 "
        "&& ls result.tar.aa",
        prints="result.tar.aa",
        slow=True,
        long=True,
    ),
    "python -m training.compare smollm2 smollm2-softpick --text unseen.txt --out smollm2-page "
    "--quick": Elsewhere("tests/training/test_compare.py"),
    "python -m quant.quantize smollm2-softpick smollm2-softpick-4bit --bits 4 --embeddings 6": Run(
        f"{YOUR_LLAMA} && python -m training.convert your-llama to-pack --variant softpick && "
        "python -m quant.quantize to-pack packed-softpick --bits 4 --embeddings 6 "
        "--calibration 2 --length 64",
        prints=PACKED,
        slow=True,
    ),
    "make serve CKPT=smollm2-softpick-4bit": Serve(
        make_serve("served-softpick"),
        setup=f"{YOUR_LLAMA} && python -m training.convert your-llama to-serve --variant softpick "
        "&& python -m quant.quantize to-serve served-softpick --bits 4 --embeddings 8 "
        "--scheme rtn",
    ),
    "python -m training.chats smollm2 chats.jsonl": Elsewhere("tests/training/test_chats.py"),
    "python -m training.tokens your-llama books.npy --data books.txt chats.jsonl": Elsewhere(
        "tests/training/test_convert.py"
    ),
    "attnserve serve my-model": Serve(attnserve_serve("my-served"), setup=MY_MODEL + "my-served"),
    **{
        command: Run(f"(test -d my-model || {MY_MODEL}my-model) && {command}", prints)
        for command, prints in (
            ("attnserve evaluate my-model --text docs/GATEWAY.md", "per token"),
            ("attnserve quantize my-model my-model-4bit --bits 4", PACKED),
        )
    },
    "attnserve serve my-model-4bit": Serve(
        attnserve_serve("my-served-4bit"),
        setup=f"{MY_MODEL}my-served-8bit && python -m quant.quantize my-served-8bit "
        "my-served-4bit --bits 4 --scheme rtn",
    ),
    "attnserve budgets my-selective": Run(
        f"{MY_MODEL}my-selective --variant selective && attnserve budgets my-selective {SEARCH}",
        "Reference: none",
        slow=True,
        long=True,
    ),
    "attnserve budgets my-selective --reference my-softmax --text README.md": Run(
        f"{MY_MODEL}my-own --variant selective && {MY_MODEL}my-softmax --variant softmax && "
        f"attnserve budgets my-own --reference my-softmax --text README.md {SEARCH}",
        "my-softmax: at most",
        slow=True,
        long=True,
    ),
    "attnserve books": NotHere("a network"),
    "attnserve evaluate CKPT --ngrams --whole": Run(
        "attnserve evaluate checkpoints/softpick --ngrams --whole",
        prints=BOOKS,
        code=2,
    ),
    # docs/VARIANT.md
    **{
        f'make test ARGS="-k relu tests/attn_kernels/test_{name}.py"': Elsewhere(
            "tests/test_variant_example.py"
        )
        for name in ("formulas", "paged", "triton")
    },
    'make test ARGS="-k relu"': Elsewhere("tests/test_variant_example.py"),
    "python -m training.checkpoints relu": Run(
        f"{RELU} && python -m training.checkpoints relu",
        prints=BOOKS,
        code=2,
        slow=True,
        long=True,
    ),
    "make serve CKPT=checkpoints/relu": Serve(
        make_serve("checkpoints/relu"),
        setup=f"{RELU} && {MY_MODEL}checkpoints/relu --variant relu",
    ),
}


def is_covered(command: Command) -> bool:
    """Return whether a command has a rule, or names a program of a rule."""
    line = normal(command.line)
    named = command.inline and " -" not in line.removeprefix("python -m")
    return line in RULES or (named and any(rule.startswith(f"{line} ") for rule in RULES))

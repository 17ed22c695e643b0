# shellcheck shell=bash
# Where scripts/bootstrap puts what no package of the system brings. Sourced by the scripts beside it.
# The system's own sbin folders are added because Debian leaves them out for users, and runc lives there.
kiln_tools="${XDG_CACHE_HOME:-$HOME/.cache}/kiln/tools"
export PATH="$kiln_tools/bin:${CARGO_HOME:-$HOME/.cargo}/bin:$PATH:/usr/sbin:/sbin"

# The everyday commands. `just` alone lists them; none of them is needed, each is a line that can be typed.

_default:
    @just --list --unsorted

# Everything that must be green: formatting, lints, tests, scripts
test:
    scripts/test

# Kiln at work, from nothing to a pulled image
demo:
    scripts/demo

# What clippy and shellcheck say
lint:
    cargo clippy --workspace --all-targets --locked -- -D warnings
    shellcheck -x scripts/bootstrap scripts/demo scripts/test scripts/paths.sh .ci/run

# Format all code
fmt:
    cargo fmt --all

# Write schemas/ anew from the types of crates/contract
schemas:
    KILN_BLESS=1 cargo test --workspace --locked schemas

# From a request to the builder's first line, and what Kiln adds to a build
bench-dispatch:
    cargo build --release --locked -p kiln
    cargo bench --locked -p kiln-tests --bench dispatch

# References resolved a second, warm, cold, and with the registry away
bench-resolve:
    cargo build --release --locked -p kiln
    cargo bench --locked -p kiln-tests --bench resolve

# Remove what compiling left
clean:
    cargo clean

# Remove the tools that scripts/bootstrap installed for Kiln alone (not the system's packages)
clean-tools:
    rm -rf "${XDG_CACHE_HOME:-$HOME/.cache}/kiln/tools"

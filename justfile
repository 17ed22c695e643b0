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
    shellcheck -x scripts/bootstrap scripts/demo scripts/test scripts/paths.sh .ci/run tests/tests/it/chaos/played_buildah.sh

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

# Over a thousand builds while processes are killed, paused and cut off; then whether every promise was kept. Some 20 minutes.
# KILN_CHAOS_SEED replays a plan; KILN_CHAOS_BUILDS, KILN_CHAOS_FAULTS and KILN_CHAOS_MINUTES say how much
chaos:
    cargo build --release --locked -p kiln
    KILN_CHAOS_BUILDS="${KILN_CHAOS_BUILDS:-1400}" KILN_CHAOS_FAULTS="${KILN_CHAOS_FAULTS:-250}" \
    KILN_CHAOS_MINUTES="${KILN_CHAOS_MINUTES:-30}" \
        cargo test --release --locked -p kiln-tests --test it chaos::every_promise -- --nocapture

# What the layer cache saves, and what Kiln adds to buildctl by hand (needs scripts/bootstrap --buildkit)
bench-cache:
    cargo build --release --locked -p kiln
    cargo bench --locked -p kiln-tests --bench cache

# What logs cost: ingest, delay, fan-out, followers, replay (BENCH_SCALE=0.1 for a quick look)
bench-logs *PARTS:
    cargo build --release --locked -p kiln
    cargo bench --locked -p kiln-tests --bench logs -- {{PARTS}}

# Remove what compiling left
clean:
    cargo clean

# Remove the tools that scripts/bootstrap installed for Kiln alone (not the system's packages)
clean-tools:
    rm -rf "${XDG_CACHE_HOME:-$HOME/.cache}/kiln/tools"

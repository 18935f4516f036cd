# Every target does its own set-up: on a bare Debian machine only Rust and make are needed.
.POSIX:
CARGO = cargo
DEMO_ARGS =
BENCH_ARGS =

.PHONY: help setup setup-tests demo test test-long bench bench-backfill lint

help:
	@echo 'make demo   throwaway servers, live traffic, a kill in the middle, a full comparison'
	@echo 'make test   the whole test suite, on real servers'
	@echo 'make test-long  what takes over a minute by nature: a replica joins under 2,000 transactions a second'
	@echo 'make bench  the measurements of the README (release build)'
	@echo 'make bench-backfill  the initial copy against native table synchronization (release build)'
	@echo 'make lint   formatting and clippy, as CI runs them'
	@echo 'make setup  only install what the others need: Postgres and nats-server'
	@echo 'make setup-tests  the same, and what only the tests need'

setup:
	@sh tests/lab/setup.sh

setup-tests:
	@sh tests/lab/setup.sh --tests

demo: setup
	$(CARGO) build --release --locked
	target/release/millrace demo $(DEMO_ARGS)

# Scenarios wait more than they compute: twice as many of them at a time as there are processors.
test: setup-tests
	RUST_TEST_THREADS=$$(( $$(nproc) * 2 )) $(CARGO) test --locked

test-long: setup-tests
	$(CARGO) test --release --locked --test line -- --ignored --nocapture

bench: setup
	$(CARGO) build --release --locked
	target/release/millrace bench $(BENCH_ARGS)

bench-backfill: setup
	$(CARGO) build --release --locked
	target/release/millrace bench-backfill $(BENCH_ARGS)

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

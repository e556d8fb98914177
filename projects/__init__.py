"""Scripts behind the figures of this project's pages, and configs for benchmarks."""

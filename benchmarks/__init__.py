"""Side-by-side ratios, one run each; results land as JSON and a Markdown table in benchmarks/results/."""

"""Raw caption → cleaned caption and flags.

rules: lint_rules.yaml, each rule with its reason
linter: cleaning and flags
"""

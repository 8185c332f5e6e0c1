"""One recipe, several caption blends → which model follows prompts best.

Order: config → arms → prompts → caption_accuracy, upsample → measure → intervals → results → contact_sheet → report →
run → cli.
"""

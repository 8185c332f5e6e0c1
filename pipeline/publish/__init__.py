"""A dataset → a copy for others: on the Hugging Face Hub, in a folder or in a bucket

contents    what is published: what the manifest lists, and a manifest and description of its own
card        README.md: funnel, filters, provenance, licences, captions, whom to ask for removal
folder      a folder or bucket as a destination
hub         a dataset repository of the Hugging Face Hub as a destination
job         all of the above in order
"""

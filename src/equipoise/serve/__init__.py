"""An OpenAI-compatible server for hybrids: continuous batching is simple where every state has one size.

scheduler.py is the heart; app.py is what clients see of it.
"""

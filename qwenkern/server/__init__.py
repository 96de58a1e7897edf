"""The HTTP server: the APIs of OpenAI and Anthropic on the engine. Needs the extra qwenkern[serve]."""

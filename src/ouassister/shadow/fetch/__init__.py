"""The shadow's only way out: a proxy that reaches the guest's package mirrors, and nothing else.

mirrors  →  which hosts those are, and which addresses nobody may mean
proxy    →  serves HTTP and CONNECT on a socket of the shadow's own network
"""

"""What must be restarted in the guest so that nothing runs replaced files any more.

uses      →  ProcessUse      who runs which files, from memory
exposed   →  Exposed         whose files the change set replaces
policy    →  Restart         what is done about each unit
actions   →  Action          one ordered list, with what package scripts asked for
"""

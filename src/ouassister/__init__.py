"""Update a suspended virtual machine before it wakes up."""

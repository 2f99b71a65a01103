//! Guest physical memory: regions, checked access, the address map.

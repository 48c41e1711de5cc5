// Command agent is the renewd daemon of a node, with commands for its operators: see
// the usage text in usage.go, or run agent help.
package main

func main() { program.Main() }

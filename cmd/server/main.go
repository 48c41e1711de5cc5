// Command server is the renewd signing server of a trust domain, and the operator's
// command for its entries, agents and tokens: see the usage text in usage.go or run
// server help. Keysets are rotated with keysetctl.
package main

func main() { program.Main() }

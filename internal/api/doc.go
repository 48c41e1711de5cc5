// Package api is the signing server's own wire interface, generated from
// renewd.proto by make proto: the Operator service for operators and the Fleet
// service for agents. It does not contain the SPIRE Server API.
package api

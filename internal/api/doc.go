// Package api is the signing server's own wire interface, generated from
// renewd.proto by make proto: the Operator service for operators and the Fleet
// service for agents. The SPIRE Server API that agents mainly speak is not here.
package api

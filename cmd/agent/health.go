package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/cli"
)

// healthCommand is "healthcheck".
func healthCommand(ctx context.Context, call *cli.Call) error {
	var p endpoint
	p.flags(call)
	socket := call.Flags.String("socket", defaultSocketPath(call.Getenv), "")
	if _, err := call.Parse(); err != nil {
		return err
	}
	reasons, err := p.ready(ctx)
	if err != nil {
		return err
	}
	if *socket != "" {
		ctx, cancel := context.WithTimeout(ctx, p.timeout)
		defer cancel()
		if err := checkWorkloadAPI(ctx, *socket); err != nil {
			reasons = append(reasons, err.Error())
		}
	}
	if len(reasons) > 0 {
		return errors.New("not ready: " + strings.Join(reasons, "\nnot ready: "))
	}
	return cli.Printf(call.Stdout, "ready\n")
}

// checkWorkloadAPI returns nil if the Workload API answers. PermissionDenied is an
// answer, too: the agent attested this process and found no identity.
func checkWorkloadAPI(ctx context.Context, socket string) error {
	conn, err := grpc.NewClient(socketURL(socket), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("workload API at %s: %w", socket, err)
	}
	defer func() { _ = conn.Close() }()
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	if err != nil && status.Code(err) != codes.PermissionDenied {
		return fmt.Errorf("workload API at %s: %w", socket, err)
	}
	return nil
}

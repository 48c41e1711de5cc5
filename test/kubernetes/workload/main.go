// Command workload is what the pods of the tests run. "workload pause" holds a pod's
// namespaces, "workload watch" is a workload with the stock SPIFFE client, "workload ask ADDRESS"
// asks an agent once, and "workload exit" ends at once.
package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil && ctx.Err() == nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	switch {
	case len(args) == 1 && args[0] == "pause":
		<-ctx.Done()
		return nil
	case len(args) == 1 && args[0] == "exit":
		return nil
	case len(args) == 1 && args[0] == "watch":
		return watch(ctx)
	case len(args) == 2 && args[0] == "ask":
		return ask(ctx, args[1])
	default:
		return errors.New("usage: workload pause|watch|ask ADDRESS|exit")
	}
}

// watch prints each X.509-SVID that the client receives, and each of its errors, as a line of
// JSON. The address of the agent is in SPIFFE_ENDPOINT_SOCKET.
func watch(ctx context.Context) error {
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithLogger(logger{})))
	if err != nil {
		return err
	}
	defer source.Close()
	for {
		svid, err := source.GetX509SVID()
		if err != nil {
			return err
		}
		leaf := svid.Certificates[0]
		line(map[string]any{
			"spiffe_id":    svid.ID.String(),
			"hint":         svid.Hint,
			"serial":       leaf.SerialNumber.String(),
			"authority_id": hex.EncodeToString(leaf.AuthorityKeyId),
			"expires_at":   leaf.NotAfter.UTC().Format(time.RFC3339),
		})
		select {
		case <-source.Updated():
		case <-ctx.Done():
			return nil
		}
	}
}

// ask asks the agent at an address once. That it has no identity for this process is an answer.
func ask(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	_, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr(address))
	if status.Code(err) == codes.PermissionDenied {
		return nil
	}
	return err
}

func line(fields map[string]any) {
	fields["time"] = time.Now().UTC().Format(time.RFC3339Nano)
	if err := json.NewEncoder(os.Stdout).Encode(fields); err != nil {
		panic(err)
	}
}

// logger prints what the client reports as a problem. The rest is routine.
type logger struct{}

func (logger) Debugf(string, ...any) {}
func (logger) Infof(string, ...any)  {}
func (logger) Warnf(format string, args ...any) {
	line(map[string]any{"error": fmt.Sprintf(format, args...)})
}
func (l logger) Errorf(format string, args ...any) { l.Warnf(format, args...) }

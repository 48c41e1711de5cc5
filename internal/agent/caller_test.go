package agent_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/metadata"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
)

// peer and the methods of attest.Attestor identify the process of a connection.
func (w *world) peer(conn net.Conn) (*attest.Peer, error) {
	p := conn.(*agentEnd).link.process
	peer := attest.NewInProcess(p.name, uint32(os.Getuid()), uint32(os.Getgid()), p.alive)
	w.peers.Store(peer, p)
	return peer, nil
}

func (w *world) life(name cache.Process) cache.Life {
	p, ok := w.processes.Load(name)
	switch {
	case !ok || p.(*process).alive() != nil:
		return cache.Ended
	case p.(*process).stopped():
		return cache.Stopped
	}
	return cache.Running
}

func (w *world) Name() string { return "test" }

func (w *world) Attest(_ context.Context, peer *attest.Peer) ([]cache.Selector, error) {
	if d := w.attesting.Load(); d > 0 {
		time.Sleep(time.Duration(d)) // in the queue of programs to be hashed
	}
	p, ok := w.peers.Load(peer)
	if !ok {
		return nil, errors.New("unknown peer")
	}
	return p.(*process).selectors, nil
}

// connect opens the connection of a new workload to the agent.
func (w *world) connect(selectors ...int) *connection {
	return w.connectAs(testValues(selectors)...)
}

func testValues(selectors []int) []string {
	values := make([]string, len(selectors))
	for i, s := range selectors {
		values[i] = fmt.Sprint(s)
	}
	return values
}

// connectAs is connect with other selectors of the type test.
func (w *world) connectAs(values ...string) *connection { return w.begin(values...).connect() }

func workloadContext(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// fetchX509 makes one call as a new workload.
func (w *world) fetchX509(selectors ...int) error {
	_, err := w.askAs(testValues(selectors)...)
	return err
}

// askAs makes one call as a new workload with these selectors of the type test.
func (w *world) askAs(values ...string) (update, error) {
	p := w.begin(values...)
	defer p.kill()
	return p.ask()
}

// ask makes one call from the process, on a new connection.
func (p *process) ask() (update, error) {
	w, conn := p.w, p.connect()
	defer conn.leave()
	// An odd timeout, unlike any of the agent's: an answer that arrives just when the
	// call times out counts as read by the process, and yet the caller has no answer.
	ctx, cancel := context.WithTimeout(workloadContext(context.Background()), 7777*time.Millisecond)
	defer cancel()
	rpc, err := workloadpb.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})
	if err != nil {
		return update{}, err
	}
	res, err := rpc.Recv()
	if err != nil {
		return update{}, err
	}
	return w.read(res), nil
}

// fetchJWT fetches a JWT-SVID as a new workload.
func (w *world) fetchJWT(i int) (string, error) {
	conn := w.connect(i)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(workloadContext(context.Background()), 10*time.Second)
	defer cancel()
	res, err := workloadpb.NewSpiffeWorkloadAPIClient(conn).FetchJWTSVID(ctx, &workloadpb.JWTSVIDRequest{Audience: []string{"api"}})
	if err != nil {
		return "", err
	}
	return res.Svids[0].Svid, nil
}

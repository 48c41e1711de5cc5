package system_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

type fleetKey struct{}

// callEvery is how often each workload calls its neighbor.
const callEvery = 20 * time.Millisecond

// member accepts the trust domains of these tests.
var member = tlsconfig.AdaptMatcher(func(id spiffeid.ID) error {
	if name := id.TrustDomain().Name(); name != "example.org" && name != "partner.example" {
		return fmt.Errorf("a workload of trust domain %q", name)
	}
	return nil
})

// fleet is a set of workloads with the reference client at agents' sockets.
type fleet struct {
	cancel  context.CancelFunc
	work    sync.WaitGroup
	sources []*workloadapi.X509Source
	lis     []net.Listener

	mu       sync.Mutex
	calls    int
	failures []error
}

// start waits for the identity of every workload and then makes each call the next.
func (f *fleet) start(sockets []string) error {
	ctx, cancel := context.WithCancel(context.Background())
	f.cancel = cancel
	first, done := context.WithTimeout(ctx, 5*time.Minute)
	defer done()
	for _, socket := range sockets {
		source, err := workloadapi.NewX509Source(first, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+socket)))
		if err != nil {
			return fmt.Errorf("workload at %s: %w", socket, err)
		}
		f.sources = append(f.sources, source)
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		f.lis = append(f.lis, lis)
		f.work.Go(func() { f.serve(lis, source) })
	}
	for i := range f.sources {
		f.work.Go(func() { f.call(ctx, f.sources[i], f.lis[(i+1)%len(f.lis)].Addr().String()) })
	}
	return nil
}

func (f *fleet) serve(lis net.Listener, source *workloadapi.X509Source) {
	config := tlsconfig.MTLSServerConfig(source, source, member)
	var conns sync.WaitGroup
	defer conns.Wait()
	for {
		conn, err := lis.Accept()
		if err != nil {
			return
		}
		conns.Go(func() {
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(time.Minute))
			s := tls.Server(conn, config)
			if err := s.Handshake(); err == nil {
				io.WriteString(s, "ok")
				s.Close()
			}
		})
	}
}

func (f *fleet) call(ctx context.Context, source *workloadapi.X509Source, address string) {
	config := tlsconfig.MTLSClientConfig(source, source, member)
	for ctx.Err() == nil {
		err := once(address, config)
		f.mu.Lock()
		f.calls++
		if err != nil {
			f.failures = append(f.failures, err)
		}
		f.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(callEvery):
		}
	}
}

func once(address string, config *tls.Config) error {
	conn, err := net.DialTimeout("tcp", address, 10*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	answer, err := io.ReadAll(tls.Client(conn, config))
	if err == nil && string(answer) != "ok" {
		err = fmt.Errorf("answer %q", answer)
	}
	return err
}

// look returns the calls and the failures since the last call of look.
func (f *fleet) look() (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls, failures := f.calls, f.failures
	f.calls, f.failures = 0, nil
	return calls, errors.Join(failures...)
}

func (f *fleet) stop() {
	if f.cancel == nil {
		return
	}
	f.cancel()
	for _, l := range f.lis {
		l.Close()
	}
	f.work.Wait()
	for _, s := range f.sources {
		s.Close()
	}
}

package agent_test

import (
	"context"
	"net"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"testing/synctest"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
)

// process is a workload with connections. It can be stopped and killed.
type process struct {
	w         *world
	name      cache.Process
	values    []string // of its selectors
	selectors []cache.Selector

	mu    sync.Mutex
	ended bool
	going chan struct{} // closed while it is not stopped
	conns []*connection
}

var processes atomic.Int64

// begin starts a workload with these selectors of the type test.
func (w *world) begin(values ...string) *process {
	n := processes.Add(1)
	p := &process{w: w, name: cache.Process{PID: int(n), Started: uint64(n)}, values: values, going: make(chan struct{})}
	close(p.going)
	for _, v := range values {
		p.selectors = append(p.selectors, cache.Selector{Type: "test", Value: v})
	}
	w.processes.Store(p.name, p)
	return p
}

func (p *process) alive() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return attest.ErrGone
	}
	return nil
}

// stop is SIGSTOP: the process reads nothing.
func (p *process) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.going:
		p.going = make(chan struct{})
	default:
	}
}

// resume is SIGCONT.
func (p *process) resume() {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.going:
	default:
		close(p.going)
	}
}

func (p *process) stopped() bool {
	select {
	case <-p.runs():
		return false
	default:
		return true
	}
}

func (p *process) runs() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.going
}

// kill ends the process. Data that it has not read is lost.
func (p *process) kill() {
	p.mu.Lock()
	p.ended = true
	conns := p.conns
	p.mu.Unlock()
	for _, c := range conns {
		c.cut()
		c.ClientConn.Close()
	}
	p.resume()
}

// connection is a connection of a process to the agent.
type connection struct {
	*grpc.ClientConn
	process *process

	mu   sync.Mutex
	ends []*workloadEnd
}

// connect opens a connection to the agent that runs now.
func (p *process) connect() *connection {
	c := &connection{process: p}
	lis := p.w.workloads
	var err error
	c.ClientConn, err = grpc.NewClient("passthrough:agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			end, err := lis.dial(ctx, p)
			if err != nil {
				return nil, err
			}
			c.mu.Lock()
			c.ends = append(c.ends, end)
			c.mu.Unlock()
			return end, nil
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	p.w.check(err)
	p.mu.Lock()
	p.conns = append(p.conns, c)
	p.mu.Unlock()
	c.Connect()
	synctest.Wait()
	return c
}

// cut closes the connection as the kernel does for a process that ends.
func (c *connection) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, end := range c.ends {
		end.Close()
	}
}

// Close closes the connection, and its process ends.
func (c *connection) Close() {
	c.ClientConn.Close()
	c.process.kill()
}

// leave closes the connection. The process keeps its SVIDs.
func (c *connection) leave() { c.ClientConn.Close() }

// link is the state that both ends of a connection share. The agent's end knows how much
// the workload has not read, as the kernel does for a Unix socket.
type link struct {
	process *process
	mu      sync.Mutex
	unread  int
	reading chan struct{} // closed while it is read
	closed  chan struct{}
	close   sync.Once
}

// wait returns when the process runs and reads this connection, or has closed it.
func (l *link) wait() {
	for _, until := range []func() <-chan struct{}{l.process.runs, l.reads, l.process.runs} {
		select {
		case <-until():
		case <-l.closed:
			return
		}
	}
}

func (l *link) reads() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.reading
}

// stall stops the process from reading on the connection until the returned function is
// called.
func (c *connection) stall() (read func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	reading := make(chan struct{})
	for _, end := range c.ends {
		end.link.mu.Lock()
		end.link.reading = reading
		end.link.mu.Unlock()
	}
	return sync.OnceFunc(func() { close(reading) })
}

type agentEnd struct {
	net.Conn
	link *link
}

func (e *agentEnd) Write(b []byte) (int, error) {
	e.link.mu.Lock()
	e.link.unread += len(b)
	e.link.mu.Unlock()
	return e.Conn.Write(b)
}

func (e *agentEnd) Unread() (int, error) {
	e.link.mu.Lock()
	defer e.link.mu.Unlock()
	return e.link.unread, nil
}

type workloadEnd struct {
	net.Conn
	link *link
}

func (e *workloadEnd) Read(b []byte) (int, error) {
	e.link.wait()
	n, err := e.Conn.Read(b)
	e.link.wait() // the process may have been stopped meanwhile
	select {
	case <-e.link.closed: // data read meanwhile is lost
		return 0, net.ErrClosed
	default:
	}
	e.link.mu.Lock()
	e.link.unread -= n
	e.link.mu.Unlock()
	return n, err
}

func (e *workloadEnd) Close() error {
	e.link.close.Do(func() { close(e.link.closed) })
	return e.Conn.Close()
}

// pairListener accepts connections in memory, which know their process.
type pairListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newPairListener() *pairListener {
	return &pairListener{conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *pairListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *pairListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (*pairListener) Addr() net.Addr { return &net.UnixAddr{Name: "memory", Net: "unix"} }

func (l *pairListener) dial(ctx context.Context, p *process) (*workloadEnd, error) {
	pair := bufconn.Listen(256 << 10)
	defer pair.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		if c, err := pair.Accept(); err == nil {
			accepted <- c
		}
	}()
	workload, err := pair.DialContext(ctx)
	if err != nil {
		return nil, err
	}
	both := &link{process: p, reading: make(chan struct{}), closed: make(chan struct{})}
	close(both.reading)
	select {
	case l.conns <- &agentEnd{<-accepted, both}:
		return &workloadEnd{workload, both}, nil
	case <-l.done:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

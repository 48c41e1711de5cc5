package main

import (
	"context"
	"io"
	"time"

	"github.com/spf13/pflag"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/operator/prom"
	"github.com/renewd/renewd/internal/operator/renewd"
	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/internal/operator/spire"
)

const (
	defaultAdminSocket = "/run/renewd-server/admin.sock"
	defaultSVIDLife    = 24 * time.Hour // longest life of a SPIRE server's SVIDs, unless configured otherwise
)

// target names a deployment and its signing server. At most one of Server and
// SpireSocket is set; if none is, AdminSocket is used.
type target struct {
	TrustDomain string // empty: the server's own
	Deployment  string // empty: the only one

	AdminSocket string
	Server      string // host:port
	WorkloadAPI string // with Server: the socket that gives the operator an SVID
	SpireSocket string

	// With SpireSocket: the source of the agents' figures, or empty.
	Prometheus string // URL
	Job        string
	Agents     int // expected number; zero: as many as the server knows
	// SVIDLife is the longest life of an SVID of the SPIRE server. The last figures
	// of an agent that ended count for that long.
	SVIDLife time.Duration
}

func (p *program) flags(f *pflag.FlagSet) {
	t := &p.target
	f.StringVar(&t.TrustDomain, "trust-domain", p.getenv("TRUST_DOMAIN"), "`NAME` of the trust domain, else TRUST_DOMAIN, else the server's")
	f.StringVar(&t.Deployment, "deployment-name", p.getenv("DEPLOYMENT_NAME"), "`NAME` of the deployment, else DEPLOYMENT_NAME, else the only one")
	socket := p.getenv("RENEWD_ADMIN_SOCKET")
	if socket == "" {
		socket = defaultAdminSocket
	}
	f.StringVar(&t.AdminSocket, "admin-socket", socket, "`PATH` of renewd's admin socket, else RENEWD_ADMIN_SOCKET\n")
	f.StringVar(&t.Server, "server", "", "`HOST:PORT` of a remote renewd server; needs an SVID from the\nWorkload API at SPIFFE_ENDPOINT_SOCKET")
	f.StringVar(&t.SpireSocket, "spire-socket", "", "`PATH` of a SPIRE server's admin socket")
	f.StringVar(&t.Prometheus, "prometheus", "", "with --spire-socket: `URL` of the Prometheus that scrapes the agents")
	f.StringVar(&t.Job, "prometheus-job", prom.DefaultJob, "with --prometheus: `NAME` of the agents' scrape job")
	f.IntVar(&t.Agents, "agents", 0, "with --prometheus: the expected number `N` of agents; else those\nthat the SPIRE server knows")
	f.DurationVar(&t.SVIDLife, "svid-life", defaultSVIDLife, "with --spire-socket: no SVID lives longer than this `DURATION`")
	f.StringVarP(&p.output, "output", "o", "text", "output `FORMAT`: text or json")
}

// checkTarget rejects flags that contradict each other.
func (p *program) checkTarget(f *pflag.FlagSet) error {
	t := &p.target
	t.WorkloadAPI = p.getenv("SPIFFE_ENDPOINT_SOCKET")
	if t.TrustDomain != "" {
		if err := config.CheckTrustDomain(t.TrustDomain); err != nil {
			return cli.Usagef("--trust-domain %q %v", t.TrustDomain, err)
		}
	}
	var where []string
	for _, name := range []string{"admin-socket", "server", "spire-socket"} {
		if f.Changed(name) {
			where = append(where, "--"+name)
			if f.Lookup(name).Value.String() == "" {
				return cli.Usagef("--%s is empty: give the server's address, or omit the flag", name)
			}
		}
	}
	if len(where) > 1 {
		return cli.Usagef("%s and %s name two servers: give one of them", where[0], where[1])
	}
	if t.Server != "" {
		if err := renewd.CheckServer(t.Server, t.WorkloadAPI); err != nil {
			return err
		}
	}
	switch {
	case t.Prometheus != "" && t.SpireSocket == "":
		return cli.Usagef("--prometheus %s: a renewd server knows the figures itself; omit it, or give --spire-socket", t.Prometheus)
	case t.Prometheus == "" && (f.Changed("prometheus-job") || t.Agents != 0):
		return cli.Usagef("--prometheus-job and --agents need Prometheus: give --prometheus URL with them")
	case f.Changed("svid-life") && t.SpireSocket == "":
		return cli.Usagef("--svid-life is for a SPIRE server: a renewd server knows it; omit it, or give --spire-socket")
	case t.SVIDLife < time.Minute:
		return cli.Usagef("--svid-life must be at least a minute, and is %v", t.SVIDLife)
	case t.Agents < 0:
		return cli.Usagef("--agents must not be negative, and is %d", t.Agents)
	}
	return nil
}

// dial is the connector of the program.
func dial(ctx context.Context, t target) (runbook.Backend, io.Closer, error) {
	switch {
	case t.SpireSocket != "":
		return dialSpire(ctx, t)
	case t.Server != "":
		return dialServer(ctx, t)
	}
	return dialAdmin(ctx, t)
}

// dialAdmin connects to the admin socket of a renewd server on this machine.
func dialAdmin(_ context.Context, t target) (runbook.Backend, io.Closer, error) {
	c, err := renewd.DialSocket(t.AdminSocket)
	if err != nil {
		return nil, nil, err
	}
	return c.Backend(t.TrustDomain, t.Deployment), c, nil
}

// dialServer connects to a remote renewd server over mTLS.
func dialServer(ctx context.Context, t target) (runbook.Backend, io.Closer, error) {
	ctx, cancel := context.WithTimeout(ctx, svidTimeout)
	defer cancel()
	c, err := renewd.DialServer(ctx, t.Server, t.WorkloadAPI)
	if err != nil {
		return nil, nil, err
	}
	return c.Backend(t.TrustDomain, t.Deployment), c, nil
}

// svidTimeout limits the wait for the operator's SVID.
const svidTimeout = 30 * time.Second

// dialSpire connects to the admin socket of a SPIRE server on this machine.
func dialSpire(_ context.Context, t target) (runbook.Backend, io.Closer, error) {
	c := spire.Config{Socket: t.SpireSocket, TrustDomain: t.TrustDomain, Deployment: t.Deployment, X509Life: t.SVIDLife}
	if t.Prometheus != "" {
		figures, err := prom.New(prom.Config{URL: t.Prometheus, Job: t.Job, TrustDomain: t.TrustDomain, Expected: t.Agents, JWTLife: t.SVIDLife + time.Hour})
		if err != nil {
			return nil, nil, cli.Usagef("--prometheus: %v", err)
		}
		c.Figures = figures
	}
	b, err := spire.New(c)
	if err != nil {
		return nil, nil, err
	}
	return b, b, nil
}

package main

import (
	"context"
	"runtime/debug"

	"github.com/renewd/renewd/internal/agent"
	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/metrics"
	"github.com/renewd/renewd/renew"
)

// runCommand runs the daemon until ctx ends.
func runCommand(ctx context.Context, call *cli.Call) error {
	load := schema.Flags(call.Flags, call.Getenv)
	if _, err := call.Parse(); err != nil {
		return err
	}
	cfg, err := load()
	if err != nil {
		return err
	}
	if err := metrics.CheckWebConfig(cfg.WebConfigFile); err != nil {
		return config.FileError(err)
	}
	if call.Getenv("GOGC") == "" && call.Getenv("GOMEMLIMIT") == "" {
		// The agent is idle most of the time, and its memory is lost to the
		// workloads: with 5,000 SVIDs this needs 38 MB instead of 55, for a tenth
		// more CPU when it is busy.
		debug.SetGCPercent(25)
	}
	c := agentConfig(cfg, call.Env)
	if c.ServerProxy, err = serverProxy(cfg, call.Getenv, c.Log); err != nil {
		return err
	}
	c.Started = cli.Started(call.Getenv, c.Log)
	defer cli.Outlive(c.Log)()
	a, err := agent.New(c)
	if err != nil {
		return err
	}
	return a.Run(ctx)
}

// agentConfig converts the settings to the configuration of [agent.New].
func agentConfig(cfg *settings, e cli.Env) agent.Config {
	c := agent.Config{
		TrustDomain:       cfg.TrustDomain,
		ServerAddress:     cfg.ServerAddress,
		TrustBundleFile:   cfg.TrustBundleFile,
		InsecureBootstrap: cfg.InsecureBootstrap,
		TrustSource:       trustSource(cfg),
		Rebootstrap:       agent.Rebootstrap(cfg.Rebootstrap),
		RebootstrapDelay:  cfg.RebootstrapDelay,
		Attestor:          attestor(cfg),
		JoinToken:         cfg.JoinToken,
		JoinTokenFile:     cfg.JoinTokenFile,
		DataDir:           cfg.DataDir,
		RuntimeDir:        cfg.RuntimeDir,
		SocketPath:        cfg.SocketPath,
		SocketMode:        cfg.SocketMode,
		DiscoverPath:      cfg.DiscoverPath,
		SHA256Limit:       cfg.SHA256Limit,
		MetricsAddress:    cfg.MetricsAddress,
		WebConfigFile:     cfg.WebConfigFile,
		DeploymentName:    cfg.DeploymentName,
		Version:           cli.Version(version),
		TaintDelay:        cfg.TaintDelay,
		TaintRate:         cfg.TaintRate,
		RefreshInterval:   cfg.RefreshInterval,
		EntryRemovalDelay: cfg.EntryRemovalDelay,
		BatchSize:         cfg.BatchSize,
		KeyType:           renew.KeyType(cfg.KeyType),
		CacheSize:         cfg.SVIDCacheSize,
		ReplaceTaintedJWT: cfg.JWTTainted == jwtReplace,
		LogSelectors:      cfg.LogSelectors,
		AdminSocket:       adminSocket(cfg.AdminSocket, cfg.SocketPath),
		Log:               cli.NewLog(e.Stderr, cfg.LogLevel, cfg.LogFormat, e.Getenv),
	}
	setAttestors(&c, cfg, e.Getenv)
	return c
}

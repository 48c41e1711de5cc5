package main

import (
	"context"
	"errors"
	"flag"
	"runtime/debug"

	"github.com/renewd/renewd/internal/agent"
	"github.com/renewd/renewd/internal/upstream"
	"github.com/renewd/renewd/metrics"
	"github.com/renewd/renewd/renew"
)

// runCommand runs the daemon until ctx ends.
func runCommand(ctx context.Context, args []string, e env) error {
	fset := flag.NewFlagSet("run", flag.ContinueOnError)
	loadConfig := configFlags(fset, e.getenv)
	if err := parseFlags(fset, args, runUsage, e); err != nil {
		return err
	}
	cfg, err := loadConfig()
	if err != nil {
		return err
	}
	if err := metrics.CheckWebConfig(cfg.WebConfigFile); err != nil {
		return err
	}
	if e.getenv("GOGC") == "" && e.getenv("GOMEMLIMIT") == "" {
		// A node's daemon rests most of the time, and its memory is taken from
		// the workloads: with 5,000 SVIDs this holds 38 MB instead of 55, for a
		// tenth more CPU while it works.
		debug.SetGCPercent(25)
	}
	a, err := agent.New(agentConfig(cfg, e))
	if err != nil {
		return err
	}
	return a.Run(ctx)
}

// agentConfig hands the configuration to the assembly.
func agentConfig(cfg *config, e env) agent.Config {
	return agent.Config{
		TrustDomain:       cfg.TrustDomain,
		ServerAddress:     cfg.ServerAddress,
		TrustBundleFile:   cfg.TrustBundleFile,
		InsecureBootstrap: cfg.InsecureBootstrap,
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
		Version:           versionString(),
		TaintDelay:        cfg.TaintDelay,
		TaintRate:         cfg.TaintRate,
		RefreshInterval:   cfg.RefreshInterval,
		BatchSize:         cfg.BatchSize,
		KeyType:           renew.KeyType(cfg.KeyType),
		CacheSize:         cfg.SVIDCacheSize,
		Log:               newLog(e.stderr, cfg.LogLevel, cfg.LogFormat, e.getenv),
	}
}

// exitCode is the exit status for a failure.
func exitCode(err error) int {
	if errors.Is(err, upstream.ErrBanned) {
		return exitBanned
	}
	return exitFailed
}

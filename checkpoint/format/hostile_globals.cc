// See hostile_globals.h. Families as unpickling attacks on model files have used them: processes,
// interpreters, installers, loaders that load again, the network, files, threads.
#include "checkpoint/format/hostile_globals.h"

#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "core/mutant.h"

namespace isoshard::checkpoint {
namespace {

using Names = std::unordered_set<std::string_view>;

// With everything below them. Modules that hold values too, which checkpoints of real runs carry
// (uuid.UUID, pathlib.PosixPath, urllib.parse.ParseResult, signal.Signals), stand in kFunctions.
const Names kModules = {
    // processes and what starts them
    "os", "posix", "nt", "subprocess", "_posixsubprocess", "_winapi", "pty", "popen2",
    "multiprocessing", "asyncio", "concurrent", "imaplib", "pydoc", "_osx_support", "_aix_support",
    "pexpect", "test.support", "webbrowser", "antigravity",
    // interpreters, compilers and what calls them
    "runpy", "codeop", "timeit", "bdb", "pdb", "doctest", "idlelib", "lib2to3", "distutils",
    "setuptools", "cffi", "ctypes", "_ctypes", "types", "operator", "functools", "importlib", "imp",
    "pkgutil", "zipimport", "zipapp", "pkg_resources", "sys", "gc", "marshal", "compileall",
    "py_compile",
    // installers
    "pip._internal", "pip._vendor", "ensurepip", "venv",
    // loaders that load again
    "pickle", "_pickle", "cPickle", "pickletools", "dill", "cloudpickle", "joblib", "shelve",
    // the network
    "socket", "_socket", "ssl", "_ssl", "http.client", "http.server", "httplib", "urllib.request",
    "urllib2", "ftplib", "smtplib", "telnetlib", "poplib", "nntplib", "xmlrpc", "socketserver",
    "requests", "aiohttp", "httpx", "paramiko",
    // files and the system
    "tempfile", "shutil", "fileinput", "linecache", "sqlite3", "_sqlite3", "winreg", "_winreg",
    "threading", "_thread", "atexit", "logging.config", "mmap", "fcntl",
    // torch and numpy
    "torch.hub", "torch.serialization", "torch.jit", "torch.package", "torch.ops", "torch._ops",
    "torch.classes", "torch._classes", "torch.utils.cpp_extension", "torch.utils.collect_env",
    "torch.utils.data.datapipes", "torch._inductor", "torch._dynamo", "torch.fx.experimental",
    "torch.distributed.rpc", "torch.multiprocessing", "torch._export", "torch.export",
    "torch._library", "torch.library", "numpy.f2py", "numpy.testing", "numpy.distutils",
    "numpy.ctypeslib"};

// Of modules that hold values too.
const Names kFunctions = {"cProfile run",
                          "cProfile runctx",
                          "profile run",
                          "profile runctx",
                          "trace Trace.run",
                          "trace Trace.runctx",
                          "torch load",
                          "torch.storage _load_from_bytes",
                          "torch save",
                          "torch compile",
                          "numpy load",
                          "numpy save",
                          "numpy savez",
                          "numpy fromfile",
                          "numpy memmap",
                          "numpy loadtxt",
                          "numpy genfromtxt",
                          "numpy fromregex",
                          "uuid _get_command_stdout",
                          "uuid _popen",
                          "platform popen",
                          "platform _syscmd_file",
                          "inspect getattr_static",
                          "io open",
                          "io open_code",
                          "io FileIO",
                          "_io open",
                          "_io open_code",
                          "_io FileIO",
                          "codecs open",
                          "codecs EncodedFile",
                          "signal raise_signal",
                          "signal signal",
                          "signal alarm",
                          "signal pthread_kill",
                          "_signal raise_signal",
                          "_signal signal",
                          "_signal alarm",
                          "_signal pthread_kill"};

// Modules whose names users take for modules of their own: these functions alone, whatever begins
// with an underscore, and what lies within something.
const std::unordered_map<std::string_view, Names> kFunctionsOf = {
    {"pip", {"main"}},
    {"commands", {"getoutput", "getstatusoutput", "getstatus"}},
    {"code", {"interact", "InteractiveInterpreter", "InteractiveConsole", "compile_command"}}};

// Modules of which these alone, and exceptions, are values. What else a path has reads and writes
// files; _get_layout is how torch writes the layout of a sparse tensor. A partial is made of what
// is judged itself, and making it calls nothing; what fills a SimpleNamespace are its attributes.
const Names kPaths = {"Path",     "PosixPath",     "WindowsPath",
                      "PurePath", "PurePosixPath", "PureWindowsPath"};
const Names kBuiltins = {"set",  "frozenset", "list",   "dict",    "tuple",
                         "int",  "long",      "float",  "complex", "bool",
                         "str",  "bytes",     "slice",  "unicode", "bytearray",
                         "type", "range",     "xrange", "object",  "Ellipsis"};
const Names kSystem = {"_Environ",      "stat_result",  "statvfs_result",
                       "terminal_size", "uname_result", "times_result"};
const std::unordered_map<std::string_view, Names> kValuesOf = {
    {"builtins", kBuiltins},
    {"__builtin__", kBuiltins},
    {"pathlib", kPaths},
    {"os", kSystem},
    {"posix", kSystem},
    {"nt", kSystem},
    {"subprocess", {"CompletedProcess", "TimeoutExpired"}},
    {"socket", {"AddressFamily", "SocketKind"}},
    {"types", {"SimpleNamespace"}},
    {"functools", {"partial"}},
    {"torch.serialization", {"_get_layout"}}};

bool is_exception(std::string_view attribute) {
  return attribute.ends_with("Error") || attribute.ends_with("Exception") ||
         attribute.ends_with("Warning");
}

// Whether the list has the module or one it lies in.
bool is_listed(std::string_view module) {
  for (size_t end = module.find('.'); end != std::string_view::npos;
       end = module.find('.', end + 1)) {
    if (kModules.contains(module.substr(0, end)) && !mutant("hostile_submodules_allowed"))
      return true;
  }
  return kModules.contains(module);
}

bool is_hostile(const std::string& module, const std::string& attribute) {
  if (const auto values = kValuesOf.find(module); values != kValuesOf.end())
    return !values->second.contains(attribute) && !is_exception(attribute) &&
           !mutant("hostile_builtins_allowed");
  if (const auto own = kFunctionsOf.find(module); own != kFunctionsOf.end())
    return own->second.contains(attribute) || attribute.starts_with('_') ||
           attribute.find('.') != attribute.npos;
  return is_listed(module) ||
         (!mutant("hostile_functions_allowed") && kFunctions.contains(module + " " + attribute));
}

}  // namespace

HostileGlobal find_hostile_global(const Pickle& pickle) {
  std::vector<NodeId> hostile;
  for (NodeId node = 0; node < pickle.size(); ++node) {
    if (pickle.kind(node) == Kind::kGlobal &&
        is_hostile(pickle.module(node), pickle.attribute(node)))
      hostile.push_back(node);
  }
  if (hostile.empty()) return {};
  const auto named = [&](NodeId node, bool called) {
    return HostileGlobal{pickle.module(node) + " " + pickle.attribute(node), called};
  };
  const std::unordered_set<NodeId> all(hostile.begin(), hostile.end());
  for (NodeId node = 0; node < pickle.size(); ++node) {
    if (pickle.kind(node) != Kind::kObject) continue;
    const ObjectParts& parts = pickle.parts(node);
    if (!parts.newobj && all.contains(parts.callable)) return named(parts.callable, true);
  }
  return named(hostile.front(), false);
}

}  // namespace isoshard::checkpoint
